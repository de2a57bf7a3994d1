"""Composes an evaluation: one process, or several ranks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nmoe.cli.console import print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import ExitCode, UsageError
from nmoe.cli.eval_inputs import open_suites
from nmoe.cli.eval_model import EvalModel, Plan, check_ranks, open_alone, open_on_ranks, plan_of
from nmoe.cli.eval_report import record, results_folder, show
from nmoe.cli.eval_request import EvalRequest
from nmoe.cli.eval_tasks import measure_tasks, measure_text, recorded_name
from nmoe.cli.eval_validation import show_validation
from nmoe.cli.launch import run_ranks
from nmoe.cli.place import Place, check_gpus, end_with_launcher, place_of
from nmoe.cli.ranks import tell_failure
from nmoe.eval.lockstep import together
from nmoe.eval.schema import VALIDATION
from nmoe.eval.sources import Suite
from rich.console import Console


def run_evaluation(request: EvalRequest, context: Context) -> int:
    """Measures as requested; returns the exit code. What can be refused is refused before anything is computed.

    Of several ranks, this process becomes the one that the environment says, or else starts them all.

    Raises:
        UsageError: the request contradicts itself or the model.
        Any error of data, models, tasks or ranks.
    """
    place = place_of(context.environ, None)
    if place is not None:
        return _run_rank(request, context, place)
    suites = _suites(request, context)
    plan = plan_of(request, context)
    if plan.n_ranks > 1:
        return _start_ranks(request, context, plan)
    _measure(request, context, plan, open_alone(request, context, plan), suites)
    return ExitCode.OK


def _suites(request: EvalRequest, context: Context) -> list[Suite]:
    return open_suites(
        request.benchmarks,
        request.data,
        context,
        allow_missing=request.allow_missing,
        unsafe_exec=request.unsafe_exec,
    )


def _start_ranks(request: EvalRequest, context: Context, plan: Plan) -> int:
    """Starts the ranks, and tells how they ended."""
    check_ranks(request, plan)
    check_gpus(plan.device, plan.n_ranks, f"--gpus {plan.n_ranks}")
    ended = run_ranks(
        plan.n_ranks,
        [*context.program, *request.arguments()],
        {**context.environ, "NMOE_DATA_PATH": str(context.data_root)},
        None,
        context.console,
    )
    if ended.failure is not None:
        tell_failure(ended, ended.failure, context, "what it had not measured is not kept")
    elif ended.is_cut_off:
        print_line(context.error_console, "Stopped by a signal: what was not measured is not kept")
    return ended.code


def _run_rank(request: EvalRequest, context: Context, place: Place) -> int:
    """One rank of several. The world is left in peace only where all went well: where it did not, others may be stuck,
    and the process must end without waiting for them."""
    if place.lifeline is not None:
        end_with_launcher(place.lifeline)
    if request.gpus not in (None, place.size):
        raise UsageError(
            f"--gpus {request.gpus}: expected as many ranks, found WORLD_SIZE={place.size} in the environment: leave "
            "out --gpus; outside torchrun, unset RANK and WORLD_SIZE"
        )
    plan = replace(plan_of(request, context), n_ranks=place.size)
    check_ranks(request, plan)
    world = place.join(plan.device, plan.timeout_s)
    if world.rank != 0:
        context = replace(context, console=Console(quiet=True))
    suites = together(world, "eval data", partial(_suites, request, context))
    model = open_on_ranks(request, plan, world)
    _measure(request, context, plan, model, suites)
    model.transport.close()
    world.close()
    return ExitCode.OK


def _measure(request: EvalRequest, context: Context, plan: Plan, model: EvalModel, suites: Sequence[Suite]) -> None:
    """Computes, on all ranks; rank 0 tells and writes what was found."""
    if request.validates:
        show_validation(request, plan, model, context)
    measured = [name for name in request.names if name != VALIDATION]
    if not measured:
        return
    text = measure_text(request, plan, model, context) if request.measures_text else []
    results = measure_tasks(request, plan, model, context, suites, text)
    if model.world.rank != 0:
        return
    located = plan.located
    parent = located.folder if located.run is None else located.run.path
    folder = request.out or results_folder(
        parent, located.step, measured, limit=request.limit, data=request.data, seq_len=request.seq_len
    )
    show(context.console, results)
    results.write(folder)
    print_line(context.console, f"Results are in {folder}")
    record(results, recorded_name(model.opened, context), located.step, context)
