"""Every error that ddit raises on purpose. The commands print its one line and leave with its exit code."""


class DditError(Exception):
    """Base of all; the message says what was wrong and what to do."""

    exit_code = 1


class UsageError(DditError):
    """The request cannot be met as asked: an unknown level, a size outside the profile, an empty prompt."""

    exit_code = 2


class BundleError(DditError):
    """A bundle or one of its files is missing, damaged or from a newer version."""


class BackendError(DditError):
    """The inference engine is not installed, or failed to load or run a graph."""


class NotFiniteError(BackendError):
    """A graph gave NaN or infinity: for what it was asked, or always."""


class AdapterError(DditError):
    """An adapter file cannot be read or does not fit the model."""


class ModelError(DditError):
    """A pretrained pipeline cannot be found, read or exported."""


class ParityError(DditError):
    """An exported graph does not compute what the original model computes."""


def not_finite(graph: str, where: str, dtype: str) -> str:
    """What to say of a graph whose numbers are none."""
    mend = "" if dtype == "fp32" else f", or export it in another type than {dtype}"
    return f"{graph} gave NaN or infinity at {where}; check the bundle with ddit-run verify{mend}"
