"Anchors of headings."

def as_in_jupyter(title):
    "As JupyterLab makes them, so that links between chapters work there and on the site."
    return title.replace(' ', '-')
