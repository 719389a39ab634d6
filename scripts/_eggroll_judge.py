"""What a run has reached: both rewards and the scores of its images, each with its error."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from _eggroll_runs import REWARDS, Runs, load_weights

from diffsteer.eval import EvalSuite, load_classifier
from diffsteer.eval.features import FeatureSet, extract
from diffsteer.eval.half_samples import HalfSampling
from diffsteer.eval.reference import statistics_for
from diffsteer.pipelines import load_pipeline
from diffsteer.training.eggroll import EggrollConfig
from diffsteer.training.eggroll.questions import fixed_questions
from diffsteer.training.prompts import class_prompts

BATCH = 100


class Judge:
    """Scores the same images of every run by the classifier that no run has seen."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.suite = args, EvalSuite(("fd",))
        extractor = self.suite.extractors[0]
        self.scores = HalfSampling(statistics_for(extractor, None)[0].gaussian(), halves=50)
        judges = {name: load_classifier(name).id for name in ("guidance", "evaluation")}
        self.who = {**judges, "images": args.judged, "steps": args.judged_steps}

    @torch.no_grad()
    def __call__(self, name: str, runs: Runs) -> dict[str, Any]:
        """Rewards of each image, and scores as [value, on each half ...]."""
        pipe = load_pipeline("embedded", dtype=torch.bfloat16, device=self.args.device)
        load_weights(pipe, self.args.out, name)
        sampler = runs.sampler(pipe, replace(EggrollConfig(), sample_steps=self.args.judged_steps))
        asked = fixed_questions(class_prompts(pipe), count=self.args.judged)
        values: dict[str, list[float]] = {name: [] for name in REWARDS}
        seen: list[FeatureSet] = []
        for start in range(0, len(asked), BATCH):
            part = asked.part(slice(start, start + BATCH))
            images = sampler.sample(None, part)
            labels = torch.tensor([prompt.label or 0 for prompt in part.prompts])
            pixels = images.mul(255).round().to(torch.uint8).cpu()
            seen.append(extract(pixels, self.suite.extractors, labels=labels))
            for reward, found in values.items():
                found += runs.score(reward, images, part).tolist()
        scores = self.scores(FeatureSet.join(seen))
        rows = {name: [e.value, *e.halves.tolist()] for name, e in scores.items()}
        return {"rewards": values, "scores": rows, "judge": self.who}
