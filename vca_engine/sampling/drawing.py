"""A trained model that draws as a program was asked, with what its records and titles say."""

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from vca_engine import assemble
from vca_engine.config.schema import SampleConfig
from vca_engine.sampling.guidance import guidance_options_in_words
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.pipeline import Pipeline


def steps_in_words(sampler: Any, num_steps: int) -> str:
    """Write the steps of a sampler, `26 points, 25 steps`, or `250 steps` of one that does not count points of time."""
    if not hasattr(sampler, "steps_taken"):
        return f"{num_steps} steps"
    steps = "steps of its own" if sampler.steps_taken is None else f"{sampler.steps_taken} steps"
    return f"{num_steps} points, {steps}"


def guidance_in_words(sampling: SampleConfig, pipe: Pipeline, guide: Pipeline | None, negative: int | None) -> str:
    """Write what guidance does beside its scale: `interval 0 to 0.7, away from class cat`; nothing if that is all."""
    words = guidance_options_in_words(sampling)
    if negative is not None:
        words.append(f"away from class {pipe.class_names[negative].split(',')[0]}")
    if guide is not None:
        step, part = guide.source.get("step"), guide.source["part"]
        of_guide = ["guide", guide.folder.resolve().name, *([] if step is None else ["step", str(step)])]
        words.append(" ".join([*of_guide, *([] if part == "ema" else [part])]))
    return ", ".join(words)


class Drawing:
    """A model and its settings, checked before anything is drawn.

    Args:
        pipe: The model.
        sampling: How it draws.
        state: The processes that draw together.
        guide: A worse model of the same images to be guided away from.
        negative: A class to be guided away from, instead of none.
        sweep: Whether only some of the images are guided, those of a row with another cfg_scale than 1.

    Attributes:
        image_sampler: Draws, and counts what was drawn.
        drawn_by: The sampler in words, `ode euler 26`.
        caption: Setting -> its words in the title.

    Raises:
        ValueError: A sampler or a guidance that this model cannot have.
    """

    def __init__(
        self,
        pipe: Pipeline,
        sampling: SampleConfig,
        state: PartialState,
        *,
        guide: Pipeline | None = None,
        negative: int | None = None,
        sweep: bool = False,
    ) -> None:
        self.pipe, self.sampling, self.state, self.started = pipe, sampling, state, time.perf_counter()
        self.guided_by: dict[str, Any] = {"guide": guide, "negative": negative}
        self.image_sampler = pipe.image_sampler(sampling, **({} if sweep else self.guided_by))
        sampler = assemble.describe_sampling(dataclasses.replace(pipe.config, sample=sampling))["sampler"]
        words = [sampler["name"], *([sampler["method"]] if sampler["name"] == "ode" else []), sampler["num_steps"]]
        self.drawn_by = " ".join(map(str, words))
        self.step = pipe.source.get("step")
        self.caption = {"step": f"step {self.step}"} if self.step is not None else {}
        self.caption |= {"weights": pipe.source["part"]} if pipe.source["part"] != "ema" else {}
        steps = steps_in_words(self.image_sampler.sample, sampler["num_steps"])
        self.caption |= {"sampler": f"{' '.join(map(str, words[:-1]))}, {steps}", "evaluations": ""}
        self.caption |= {"cfg_scale": f"cfg {sampling.cfg_scale:g}"}
        if sampling.cfg_scale != 1.0 or sweep:
            self.caption |= {"guidance": guidance_in_words(sampling, pipe, guide, negative)}
        self.caption |= {"seed": f"seed {sampling.seed}"}

    @property
    def title(self) -> str:
        """The line above a picture, and on the terminal."""
        return ", ".join(filter(None, self.caption.values()))

    def add_evaluations(self, nfe: float | None) -> None:
        """Let the title say how often the network was evaluated for an image."""
        self.caption["evaluations"] = "" if nfe is None else f"{nfe:g} evaluations"

    def image_sampler_of(self, sampling: SampleConfig) -> ImageSampler:
        """Make what draws as other settings say, guided as this is, unless their cfg_scale is 1."""
        return self.pipe.image_sampler(sampling, **(self.guided_by if sampling.cfg_scale != 1.0 else {}))

    def with_settings(self, sampling: SampleConfig) -> "Drawing":
        """Make a drawing of its own of other settings, as `image_sampler_of`."""
        return Drawing(self.pipe, sampling, self.state, **(self.guided_by if sampling.cfg_scale != 1.0 else {}))

    def settings(self) -> dict[str, Any]:
        """Say what, beside its number and label, makes an image what it is; nothing but on the main process."""
        return self.pipe.settings(self.sampling, **self.guided_by) if self.state.is_main_process else {}

    def facts(self, nfe: float | None, **more: Any) -> dict[str, Any]:
        """Say what else is in the record."""
        times = {
            "seconds": round(time.perf_counter() - self.started, 3),
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        }
        guide = self.guided_by["guide"]
        guides = {"guide_checkpoint": guide.source} if guide else {}
        return {"nfe": nfe, **more, **times, "num_processes": self.state.num_processes, **self.pipe.facts(), **guides}

    def nfe_of_all(self) -> float | None:
        """Count the network evaluations an image over all processes, which all call this."""
        counts = gather_object([(self.image_sampler.evaluations, self.image_sampler.drawn)])
        evaluations, drawn = np.array(counts).sum(axis=0)
        return float(evaluations / drawn) if drawn else None
