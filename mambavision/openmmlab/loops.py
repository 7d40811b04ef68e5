"""Training loops for mmengine's runner."""

import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from mambavision.errors import UserError
from mambavision.openmmlab.hooks import set_random_states


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's loop over iterations, but a resumed run continues as if it had not been interrupted, and at once.

    mmengine saves no random states, and loads all data again that a resumed run has seen. Here random states and data
    loader start anew after every checkpoint and validation: with states that depend on seed, iteration and rank alone,
    and at the sample that comes next. That needs a data loader whose workers start anew, too.

    Raises:
        UserError: The data loader keeps its workers, or has another sampler than InfiniteSampler.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.dataloader.sampler, InfiniteSampler) or self.dataloader.persistent_workers:
            raise UserError(
                "train_dataloader: ResumableIterLoop needs sampler=dict(type='InfiniteSampler') and "
                "persistent_workers=False; or use IterBasedTrainLoop, which cannot continue a run exactly."
            )

    def run(self) -> nn.Module:
        """Train to the last iteration; return the model."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        batches, checkpoint = None, None
        while self._iter < self._max_iters and not self.stop_training:
            if batches is None or runner.message_hub.get_info("last_ckpt") != checkpoint:
                batches, checkpoint = self._batches_from_here(), runner.message_hub.get_info("last_ckpt")
            runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            if self._validates_now():
                batches = None
                runner.val_loop.run()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _batches_from_here(self) -> Iterator[Any]:
        set_random_states(self.runner, self._iter)
        sampler, used = self.dataloader.sampler, self._iter * self.dataloader.batch_size
        sampler.indices = itertools.islice(sampler._indices_of_rank(), used, None)
        return iter(self.dataloader)

    def _validates_now(self) -> bool:
        is_due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        return self.runner.val_loop is not None and self._iter >= self.val_begin and is_due
