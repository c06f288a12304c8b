"Package metadata from settings.ini, as nbdev uses it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']

setup(
    version = cfg['version'],
    description = cfg['description'],
    long_description = Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type = 'text/markdown',
    keywords = cfg['keywords'].split(),
    author = cfg['author'],
    author_email = cfg['author_email'],
    url = cfg['git_url'],
    license = {'apache2': 'Apache-2.0'}[cfg['license']],
    classifiers = ['Intended Audience :: ' + cfg['audience'], 'Natural Language :: ' + cfg['language'],
                   'Programming Language :: Python :: 3', 'Development Status :: 3 - Alpha'],
    python_requires = '>=' + cfg['min_python'],
    install_requires = cfg['requirements'].split(),
    extras_require = {name: cfg[f'{name}_requirements'].split() for name in ('dev', 'docs', 'ray', 'serve', 'track')},
    entry_points = {'console_scripts': cfg['console_scripts'].split()},
    # recipes, sweeps and the notebooks that papermill runs come along, as `experiments` inside the package
    packages = [*find_packages(include=[lib, lib + '.*']), lib + '.experiments'],
    package_dir = {lib + '.experiments': 'experiments'},
    package_data = {
        lib: ['assets/**'],
        lib + '.experiments': ['recipes/*.yaml', 'sweeps/*.yaml', 'train.ipynb', 'ablation.ipynb', 'report.ipynb',
                                  'published.csv'],
    },
)
