"""The model families that ddit-export knows. Importing this imports no torch: a family's module is loaded when used."""

from ddit.exporter.families.base import Family, FamilyInfo
from ddit.exporter.models import Source
from ddit.runtime.errors import ModelError

_registry: dict[str, FamilyInfo] = {}


def register(info: FamilyInfo) -> None:
    """Make a family known under its name, which becomes a command of ddit-export."""
    _registry[info.name] = info


def families() -> tuple[FamilyInfo, ...]:
    """Every family that is known, by name."""
    return tuple(_registry[name] for name in sorted(_registry))


def find_family(name: str) -> type[Family]:
    """A family's class. Raises `KeyError` for a name that is not registered."""
    return _registry[name].load()


def family_of(source: Source) -> type[Family]:
    """The family that a pipeline's folder belongs to. Raises `ModelError` where none exports such pipelines."""
    found = source.config("", "model_index.json").get("_class_name")
    known = [info.load() for info in families()]
    for family in known:
        if family.pipeline == found:
            return family
    raise ModelError(f"{source.folder} holds a {found}; ddit knows {' and '.join(one.pipeline for one in known)}")


def _flux() -> type[Family]:
    from ddit.exporter.families.flux.model import Flux

    return Flux


FLUX = FamilyInfo(
    name="flux",
    title="FLUX.1",
    model="black-forest-labs/FLUX.1-dev",
    levels=(2, 4),
    dtype="fp16",
    profile="1024",
    load=_flux,
)


def _wan() -> type[Family]:
    from ddit.exporter.families.wan.model import Wan

    return Wan


WAN = FamilyInfo(
    name="wan",
    title="Wan 2.1",
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    levels=(2, 4),
    dtype="fp16",
    profile="wan-480",
    load=_wan,
)

register(FLUX)
register(WAN)
