"""The pictures to make: every prompt with its seeds."""

from command_line.prompts import PROMPT_SEED, read_prompts
from ddit.runtime.errors import UsageError
from demo_model.scenes import Scene, balanced_scenes
from evaluation.metrics import Sample

SEED_STRIDE = 10_000


def read_samples(prompts: str, seeds: int, background: str | None = None) -> list[Sample]:
    """Every prompt with its seeds, the seeds of a prompt one after another. Raises `UsageError`.

    Prompt number i has the seeds i, i + 10,000, …: no two pictures start from the same noise, and a longer list goes on
    from a shorter one. With a ``background``, only the scenes that have it are taken, with their numbers.
    """
    asked = read_prompts(prompts)
    described: list[tuple[int, str, Scene | None]]
    if isinstance(asked, range):
        scenes = balanced_scenes(asked.stop, PROMPT_SEED)
        chosen = [number for number in asked if background in (None, scenes[number].background)]
        if not chosen:
            raise UsageError(f"none of {prompts} has a {background} background; take more scenes")
        described = [(number, scenes[number].caption, scenes[number]) for number in chosen]
    elif background:
        raise UsageError("--background chooses among scenes; give --prompts scenes:N or leave it out")
    else:
        described = [(number, prompt, None) for number, prompt in enumerate(asked)]
    return [
        Sample(number, prompt, number + SEED_STRIDE * again, scene)
        for number, prompt, scene in described
        for again in range(seeds)
    ]
