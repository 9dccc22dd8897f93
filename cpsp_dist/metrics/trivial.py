"""What answers without a look at the features would reach, and whether the model's answers are that trivial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics.metric import Metric, predict, share
from cpsp_dist.models.layers import Output


class Trivial(Metric):
    """baselines: of 'majority_label' (the split's commonest label in each segment) its `label` and `accuracy`; of
    'always_event' (each segment an event, of the category that the model gives the video) `accuracy` and
    `event_accuracy`. flags: texts, one for each way in which the model's answers are trivial."""

    def shape(self, categories: int, seconds: int) -> tuple[int, ...]:
        return 3, categories + 1

    def count(self, output: Output, batch: Batch) -> Tensor:
        """By label: segments that have it, segments that were given it, and event segments of a video whose category
        the model has right. [3, K+1] int64."""
        categories = output.category_logits.shape[1]
        truth, answer = batch.segment_labels(categories)[batch.valid], predict(output)[batch.valid]
        known = output.category_logits.argmax(1, keepdim=True)[batch.valid] == truth
        return torch.stack(
            [torch.bincount(each.flatten(), minlength=categories + 1) for each in (truth, answer, truth[known])]
        )

    def result(self) -> dict[str, Any]:
        present, answered, known = self.counts
        names = [*self.categories, "background"]
        total, most = present.sum(), int(present.argmax())
        return {
            "baselines": {
                "majority_label": {"label": names[most], "accuracy": share(present[most], total)},
                "always_event": {
                    "accuracy": share(known[:-1].sum(), total),
                    "event_accuracy": share(present[:-1].sum(), total),
                },
            },
            "flags": flags(present, answered, names),
        }

    @classmethod
    def summary(cls, result: dict[str, Any]) -> list[str]:
        majority, always = result["baselines"]["majority_label"], result["baselines"]["always_event"]
        compared = (
            f"without a look at the features: '{majority['label']}' everywhere {100 * majority['accuracy']:.2f} %, an "
            f"event everywhere {100 * always['accuracy']:.2f} % (of event or background alone "
            f"{100 * always['event_accuracy']:.2f} %)"
        )
        return [compared, *(f"attention: {text}" for text in result["flags"])]


def flags(present: Tensor, answered: Tensor, names: list[str]) -> list[str]:
    """present, answered: [K+1] segments that have each label, and that were given it; the last is background."""
    found = []
    if answered[-1] == 0 and present[-1] > 0 and answered.sum() > 0:
        share_of_events = 100 * share(present[:-1].sum(), present.sum())
        found.append(
            f"the model never predicts background: its event accuracy is the share of event segments, "
            f"{share_of_events:.2f} %"
        )
    if answered[:-1].sum() == 0 and present[:-1].sum() > 0:
        found.append("the model never predicts an event")
    given = torch.nonzero(answered[:-1]).flatten().tolist()
    if len(given) == 1 and (present[:-1] > 0).sum() > 1:
        found.append(f"the model predicts one category only: '{names[given[0]]}'")
    return found
