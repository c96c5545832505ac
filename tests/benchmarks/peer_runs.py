"""SAELens's ``LanguageModelSAETrainingRunner`` on the run of ``sparse_runs``; its own environment runs it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from tests.benchmarks import sparse_runs as at
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    """Print the CPU seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = f"transformer.h.{at.BLOCK}"
    model = GPT2LMHeadModel(GPT2Config(**at.GPT2)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=at.WIDTH, d_sae=at.LATENTS, k=at.KEPT),
            model_class_name="AutoModelForCausalLM",
            hook_name=hook,
            context_size=at.LENGTH,
            store_batch_size_prompts=at.CONTEXTS,
            n_batches_in_buffer=at.BUFFER // at.LENGTH,  # its buffer holds this many rows of text
            training_tokens=at.TOKENS,
            train_batch_size_tokens=at.BATCH,
            lr=at.RATE,
            prepend_bos=False,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=place,
            verbose=False,
        )
        rows = Dataset.from_dict({"input_ids": at.ids().tolist()})
        proxy = HookedProxyLM(model, None, hook_names=[hook])  # type: ignore[arg-type]
        runner = LanguageModelSAETrainingRunner(config, override_dataset=rows, override_model=proxy)
        forward, steps = runner.sae.training_forward_pass, [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            return forward(*args, **kwargs)

        runner.sae.training_forward_pass = counted  # type: ignore[method-assign]

        def run() -> int:
            runner.run()
            return steps[0]

        at.answer(run)


if __name__ == "__main__":
    main()
