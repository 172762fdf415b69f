"""The pictures or clips to make: every prompt with its seeds."""

from command_line.prompts import PROMPT_SEED, read_prompts
from ddit.runtime.errors import UsageError
from demo_model.scenes import Scene, balanced_scenes
from demo_video.clips import balanced_clips
from evaluation.metrics import Sample

SEED_STRIDE = 10_000


def read_samples(prompts: str, seeds: int, background: str | None = None) -> list[Sample]:
    """Every prompt with its seeds, the seeds of a prompt one after another. Raises `UsageError`.

    Prompt number i has the seeds i, i + 10,000, …: no two pictures start from the same noise, and a longer list goes on
    from a shorter one. With a ``background``, only the scenes that have it are taken, with their numbers.
    """
    asked = read_prompts(prompts)
    described: list[tuple[int, str, Scene | None, str]]  # number, prompt, what it describes, of what kind that is
    if isinstance(asked, list):
        described = [(number, prompt, None, "") for number, prompt in enumerate(asked)]
    elif asked.kind == "clips":
        clips = balanced_clips(asked.asked.stop, PROMPT_SEED)
        described = [(number, clips[number].caption, None, clips[number].kind) for number in asked.asked]
    else:
        scenes = balanced_scenes(asked.asked.stop, PROMPT_SEED)
        chosen = [number for number in asked.asked if background in (None, scenes[number].background)]
        if not chosen:
            raise UsageError(f"none of {prompts} has a {background} background; take more scenes")
        described = [(number, scenes[number].caption, scenes[number], scenes[number].kind) for number in chosen]
    if background and not any(scene for _, _, scene, _ in described):
        raise UsageError("--background chooses among scenes; give --prompts scenes:N or leave it out")
    return [
        Sample(number, prompt, number + SEED_STRIDE * again, scene, kind)
        for number, prompt, scene, kind in described
        for again in range(seeds)
    ]
