"""TRL's GRPOTrainer on the work of bench/step.py, one step whenever it is asked for one.

Started by bench/step.py, which sends a job on standard input and then an empty line per step;
each line of standard output is a JSON object. Alone it is of no use.

What is made equal: checkpoint, images and rendered prompts in their order, N, completion limit,
temperature, suppressed tokens, learning rate and the rest of AdamW, KL coefficient, clip range,
token-mean loss, updates per step, dtype, threads. Advantages are TRL's own, from our judge and our
reward rule: they divide by std + 1e-4 where we divide by std + 1e-6. Left at what is fastest for
TRL here: no gradient checkpointing (its default is on), no logging, no saving.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from typing import Any, TextIO

import torch

from speciarl.bench.step_meter import Meter, StepRecord, peak_memory
from speciarl.judge.registry import make_judge
from speciarl.judge.trl_reward import TRLReward
from speciarl.kernels.reward import RewardSpec

Job = dict[str, Any]


def image_only_processor(folder: str, meter: Meter) -> Any:
    """A Qwen2.5-VL processor without a video processor, which would need torchvision."""
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    class ImageOnly(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return meter.timed("prompts", super().__call__)(*args, **kwargs)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ImageOnly(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


class Reward(TRLReward):
    """Our judge and rule as TRL's reward function; also counts the tokens it is shown."""

    def __init__(self, job: Job) -> None:
        judge = make_judge(job["judge"], taxonomy=job["taxonomy"])
        super().__init__(judge, RewardSpec(**job["reward"]), num_generations=job["n"])
        self.tokens = 0

    def __call__(self, **columns: Any) -> list[float | None]:
        """Rewards of all completions of a step; a prompt's are neighbours."""
        self.tokens = sum(len(ids) for ids in columns["completion_ids"])
        return super().__call__(**columns)


def arguments(job: Job, folder: str) -> Any:
    """GRPOConfig: one TRL step is `prompts` x `n` completions and one update."""
    from trl import GRPOConfig

    cuda = job["device"] == "cuda"
    rows = job["prompts_per_step"] * job["n"]
    if rows % job["micro_batch"]:
        raise ValueError(f"{rows} completions do not divide into batches of {job['micro_batch']}")
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=rows // job["micro_batch"],
        num_generations=job["n"],
        max_completion_length=job["max_new_tokens"],
        max_steps=job["steps"],
        temperature=job["temperature"],
        top_p=1.0,
        top_k=0,
        generation_kwargs={"suppress_tokens": job["banned"]},
        beta=job["beta"],
        epsilon=job["clip_low"],
        epsilon_high=job["clip_high"],
        num_iterations=1,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=job["weight_decay"],
        max_grad_norm=job["grad_clip"],
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=not cuda,
        bf16=cuda,
        dataloader_pin_memory=cuda,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )


def make_dataset(job: Job) -> Any:
    """The prompts in the order of their steps; an image is decoded whenever a row is read.

    The fingerprint is given because datasets 5.2 cannot compute one with pyarrow 26.
    """
    import datasets
    from datasets.table import InMemoryTable

    text = datasets.Value("string")
    features = datasets.Features(
        {"prompt": [{"role": text, "content": text}], "image": datasets.Image(), "truth": text}
    )
    prompt = [{"role": "user", "content": job["text"]}]
    rows = [
        features.encode_example({"prompt": prompt, "image": row["image"], "truth": row["truth"]})
        for row in job["prompts"]
    ]
    table = InMemoryTable.from_pylist(rows, schema=features.arrow_schema)
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint="step")


def make_trainer(job: Job, folder: str, meter: Meter, reward: Reward) -> Any:
    """A GRPOTrainer over the job's prompts, watched by the meter."""
    from transformers import AutoModelForImageTextToText
    from trl import GRPOTrainer

    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(job, folder),
        train_dataset=make_dataset(job),
        processing_class=image_only_processor(job["model"], meter),
    )
    meter.watch_model(model, samples=True)
    if trainer.ref_model is not None:
        meter.watch_model(trainer.ref_model, samples=False)
    peer: Any = trainer
    peer.model.generate = meter.timed("generate", peer.model.generate)
    peer._calculate_rewards = meter.timed("judge", peer._calculate_rewards)
    peer._get_per_token_logps_and_entropies = meter.timed(
        lambda: "policy forward" if torch.is_grad_enabled() else "reference",
        peer._get_per_token_logps_and_entropies,
    )
    peer.compute_loss = meter.timed("loss", peer.compute_loss)
    tensor: Any = torch.Tensor
    tensor.backward = meter.timed("backward", tensor.backward)
    peer.accelerator.clip_grad_norm_ = meter.timed("optimizer", peer.accelerator.clip_grad_norm_)
    torch.optim.AdamW.step = meter.timed("optimizer", torch.optim.AdamW.step)  # type: ignore[method-assign]
    return trainer


def paced(job: Job, meter: Meter, reward: Reward, orders: TextIO, out: TextIO) -> Any:
    """A callback that lets TRL do one step per order and reports it.

    A step is timed from its order to the end of its update, so that the next step's data loading
    belongs to the next step.
    """
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def wait(self, control: Any) -> None:
            if orders.readline() == "":
                control.should_training_stop = True
            meter.start()

        def on_train_begin(self, args: Any, state: Any, control: Any, **other: Any) -> None:
            say(out, ready=True)
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **other: Any) -> None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            seconds, took = meter.seconds, meter.elapsed()
            learn = sum(seconds[name] for name in ("reference", "loss", "backward", "optimizer"))
            parts = {"step": took, "learn": learn, "push": 0.0}
            parts |= {name: seconds.pop(name, 0.0) for name in ("generate", "judge")}
            samples = job["prompts_per_step"] * job["n"]
            first = (state.global_step - 1) * job["prompts_per_step"]
            drawn = job["prompts"][first : first + job["prompts_per_step"]]
            prompt_tokens = sum(len(row["ids"]) for row in drawn) * job["n"]
            record = StepRecord.of(
                parts,
                meter,
                samples=samples,
                completion_tokens=reward.tokens,
                learn_tokens=prompt_tokens + reward.tokens - samples,
            )
            say(out, record=asdict(record), memory=peak_memory(args.device))
            self.wait(control)

    return Pace()


def check_prompts(trainer: Any, job: Job) -> None:
    """Raises RuntimeError where TRL renders or tokenises a prompt otherwise than we do."""
    row = trainer.train_dataset[0]
    content = [
        {"type": "image", "image": row["image"]},
        {"type": "text", "text": job["text"]},
    ]
    ids = trainer.processing_class.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    if list(ids) != job["prompts"][0]["ids"]:
        raise RuntimeError(f"TRL's prompt {list(ids)} is not ours {job['prompts'][0]['ids']}")


def say(out: TextIO, **message: Any) -> None:
    """One line of the protocol."""
    print(json.dumps(message), file=out, flush=True)


def main() -> None:
    """Reads the job, then steps on demand until standard input ends."""
    # Whatever the libraries print must not get into the protocol.
    out, sys.stdout = sys.stdout, sys.stderr
    job: Job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    meter, reward = Meter(), Reward(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder, meter, reward)
        check_prompts(trainer, job)
        trainer.add_callback(paced(job, meter, reward, sys.stdin, out))
        trainer.train()


if __name__ == "__main__":
    main()
