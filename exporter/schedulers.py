"""diffusers' schedulers, as far as the runtime computes them: any other setting is refused, never approximated."""

from collections.abc import Mapping
from typing import Any

from ddit.exporter.models import Config
from ddit.runtime.errors import ModelError

EULER = "FlowMatchEulerDiscreteScheduler"
EULER_FIXED: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
UNIPC = "UniPCMultistepScheduler"
UNIPC_FIXED: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "predict_x0": True,
    "solver_type": "bh2",
    "solver_p": None,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "disable_corrector": [],
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
}
# what diffusers takes for a setting that a file does not have, where that is not the value above
UNIPC_USUAL = {"prediction_type": "epsilon", "use_flow_sigmas": False}


def check_scheduler(config: Config, fixed: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """The class of a scheduler's configuration, if it is one of those given and has its fixed settings.

    Raises `ModelError` otherwise, which names ``model`` as what the classes are used for.
    """
    name = config.get("_class_name")
    known = fixed.get(str(name))
    usual = UNIPC_USUAL if name == UNIPC else {}
    found = {} if known is None else {key: config.get(key, usual.get(key, value)) for key, value in known.items()}
    odd = sorted(key for key, value in found.items() if known is not None and value != known[key])
    if known is None or odd:
        what = f"with {odd[0]} = {found[odd[0]]!r}" if odd else str(name)
        ours = str(name) if odd else " or ".join(fixed)
        raise ModelError(f"scheduler {what} is not supported; ddit samples with {ours} as {model} uses it")
    return str(name)
