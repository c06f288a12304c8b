"What every process that a test starts has from its beginning: slow imports, and the tiny editor as it was read."
import diffusers.pipelines.flux.pipeline_flux_kontext, torch, torch.distributed.run         # noqa: F401
import mt_editflow_nb.cli.eval, mt_editflow_nb.cli.train                                     # noqa: F401
import copied, helpers                                                                       # noqa: F401

copied.pristine(torch.device('cpu'), torch.float32)
