"""The command that says what a language model can be fine-tuned with: `recommend`."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from tune_easytrain.cli_options import AsJson, print_table, to_out
from tune_easytrain.errors import BadInputError

if TYPE_CHECKING:
    from tune_easytrain.fine_tuning import FineTuning
    from tune_easytrain.recommendation import Memory, Recommendation
    from tune_easytrain.rule_of_thumb import RuleOfThumb


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    example = "tune-easytrain recommend --model 7b --memory 24GiB --task qa --method lora --target 32"
    app.command(epilog=f"Example:  {example}")(recommend)


def recommend(
    model: Annotated[
        str, typer.Option(metavar="SIZE", help="1b, 3b, 7b, 13b, 30b or 70b.", show_default=False)
    ],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="The memory of one GPU, such as 24GiB.", show_default=False)
    ],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="classification, generation or qa.", show_default=False)
    ],
    target: Annotated[int, typer.Option(min=1, help="The effective batch size.")] = 32,
    method: Annotated[str, typer.Option(metavar="METHOD", help="full or lora.")] = "full",
    precision: Annotated[
        str, typer.Option(metavar="FORMAT", help="bf16 (autocast) or fp32: what is computed in.")
    ] = "bf16",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="bf16 or fp32: what weights are held in; default: fp32, with LoRA the precision.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute every block again in the backward pass.")
    ] = False,
    sharding: Annotated[
        str, typer.Option(metavar="WHAT", help="none, optimizer or full: what the devices split.")
    ] = "none",
    devices: Annotated[int, typer.Option(min=1, help="GPUs that train together.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of the longest sample.")] = 512,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="The rank of LoRA's adapters; default: 16.")
    ] = None,
    memory_fraction: Annotated[
        float, typer.Option(min=0.01, max=1, help="The share of the memory that training may use.")
    ] = 0.9,
    rule_of_thumb: Annotated[
        bool, typer.Option("--rule-of-thumb", help="Show a rule of thumb beside the estimate.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how many samples a language model can be fine-tuned with at once, and what takes the memory.

    The model of that size is traced without its weights; neither a GPU nor a download is needed.
    """
    from tune_easytrain.fine_tuning import DEFAULT_LORA_RANK, FineTuning, default_weights
    from tune_easytrain.gpu_options import chosen_accelerator
    from tune_easytrain.language_models import find_language_model
    from tune_easytrain.recommendation import Memory

    if lora_rank is not None and method != "lora":
        raise BadInputError(f"--lora-rank {lora_rank} is for LoRA; add --method lora")
    names: Any = {"task": task, "method": method, "precision": precision, "sharding": sharding}
    way = FineTuning(
        model=find_language_model(model),
        weights=cast(Any, weights or default_weights(method, names["precision"])),
        checkpointing=checkpointing,
        num_devices=devices,
        sequence_length=sequence_length,
        lora_rank=lora_rank or DEFAULT_LORA_RANK,
        **names,
    )
    accelerator = chosen_accelerator(None, memory)
    assert accelerator is not None
    made = _estimate(way, Memory(accelerator.total_bytes, memory_fraction), target)
    rule = _rule(way, accelerator.total_bytes) if rule_of_thumb else None
    if as_json:
        told = None if rule is None else rule.as_json(made.effective_batch_sizes)
        to_out(json.dumps(made.as_json() | {"rule_of_thumb": told}, indent=2))
    else:
        _print(made, rule)


def _estimate(way: FineTuning, memory: Memory, target: int) -> Recommendation:
    from tune_easytrain.optional_packages import check_command_packages

    check_command_packages("recommendation")
    with Console(stderr=True).status(f"Tracing {way.model.published_as}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what the two packages still call in each other
        from tune_easytrain.fine_tuning_task import estimate_fine_tuning, resident_memory
        from tune_easytrain.recommendation import recommend

        return recommend(way, memory, target, resident_memory, estimate_fine_tuning)


def _rule(way: FineTuning, memory_bytes: int) -> RuleOfThumb:
    from tune_easytrain.rule_of_thumb import apply_rule_of_thumb

    return apply_rule_of_thumb(way.model.size, way.task, memory_bytes)


def _print(made: Recommendation, rule: RuleOfThumb | None) -> None:
    for line in made.describe():
        to_out(line)
    if made.fits:
        print_table(*made.plan_table())
    print_table(*made.part_table())
    if made.changed:
        to_out(made.describe_changes())
        print_table(*made.change_table())
    if rule is not None:
        for line in rule.describe(made.effective_batch_sizes):
            to_out(line)
