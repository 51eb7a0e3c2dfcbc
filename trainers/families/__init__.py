"""Model families by their name in a config. A new one is a file here and a line below."""

from .base import Family
from .flux import Flux
from .sd3 import SD3
from .sd15 import SD15

FAMILIES: dict[str, type[Family]] = {"sd15": SD15, "sd3": SD3, "flux": Flux}
