"""The ``costeer`` command: the only reader of argv, and of the environment outside vLLM's processes."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from costeer_vllm.errors import CoSteerError

app = typer.Typer(
    help="Steer a large model served by vLLM with a private context that never leaves your device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
errors = Console(stderr=True)

AttachKey = Annotated[
    str | None,
    typer.Option(envvar="COSTEER_ATTACH_KEY", help="The key that edge workers and engines must have.", show_envvar=True),
]
edges = typer.Typer()
app.add_typer(edges, name="edge")
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=PASS_THROUGH)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The large model: a Hugging Face name or a folder.")],
    hub: Annotated[str | None, typer.Option(envvar="COSTEER_HUB", help="A hub that runs elsewhere: host:port.")] = None,
    hub_host: Annotated[
        str, typer.Option(envvar="COSTEER_HUB_HOST", help="Where our own hub listens for edge workers.")
    ] = "127.0.0.1",
    hub_port: Annotated[int, typer.Option(envvar="COSTEER_HUB_PORT", help="And on which port.")] = 8770,
    attach_key: AttachKey = None,
) -> None:
    """Serve MODEL with vLLM and steering on. Other options go to vllm serve as they are."""
    from costeer_vllm.serve import serve_command

    environment = {"HUB": hub, "HUB_HOST": hub_host, "HUB_PORT": str(hub_port), "ATTACH_KEY": attach_key}
    os.environ.update({f"COSTEER_{name}": value for name, value in environment.items() if value is not None})
    command = serve_command(model, context.args)
    os.execv(command[0], command)


@app.command()
def hub(
    host: Annotated[
        str, typer.Option(help="Where to listen for edge workers; beyond loopback an attach key is due.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And on which port.")] = 8770,
    engine_endpoint: Annotated[
        str | None, typer.Option(help="Where to listen for engines: tcp://host:port or ipc://path; default port + 1.")
    ] = None,
    attach_key: AttachKey = None,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="End when the starting process has ended.")
    ] = False,
) -> None:
    """Run a hub: the place where edge workers and engines meet."""
    from costeer_vllm.hub.app import HubSettings, run

    shown = f"[{host}]" if ":" in host else host
    endpoint = engine_endpoint or f"tcp://{shown}:{port + 1}"
    run(HubSettings(host=host, port=port, engine_endpoint=endpoint, attach_key=attach_key, exit_with_parent=exit_with_parent))


@edges.callback(invoke_without_command=True)
def edge(
    command: typer.Context,
    hub: Annotated[str | None, typer.Option(help="The hub to attach to: ws://host:port.")] = None,
    name: Annotated[str | None, typer.Option(help="The name under which requests ask for this worker.")] = None,
    model: Annotated[str | None, typer.Option(help="The small model: a Hugging Face name or a folder.")] = None,
    context: Annotated[
        Path | None, typer.Option(help="The private context: a file, or a folder of them. It never leaves this process.")
    ] = None,
    contexts: Annotated[
        Path | None,
        typer.Option(help="Contexts that requests choose by context_ref: JSONL, with ref, before and after the query."),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a long context's history that are chosen for a query; 1024, or half of the small model's positions.",
        ),
    ] = None,
    reranker: Annotated[
        str | None, typer.Option(help="A cross-encoder that chooses among a long context after BM25: a name or a folder.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A chat template (Jinja) in place of the small model's own.")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="COSTEER_KEY", help="A steering key: only requests that present it are steered.")
    ] = None,
    attach_key: AttachKey = None,
    delta: Annotated[Literal["lossless", "sparse"], typer.Option(help="How deltas are encoded.")] = "sparse",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="The small model's number format.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    max_streams: Annotated[int, typer.Option(min=1, max=4096, help="Requests steered at the same time.")] = 64,
    look_ahead: Annotated[
        bool, typer.Option(help="Send deltas for the tokens expected next, where the way to the server is long: cloud fusion.")
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for the small model.")] = None,
    tokens_only: Annotated[
        bool, typer.Option("--tokens-only", help="No delta leaves this device: requests are fused at the edge, or refused.")
    ] = False,
    max_bits: Annotated[
        float | None,
        typer.Option(min=0, help="What one answer may tell about the context, whatever requests ask for; with --tokens-only."),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Where every stream is entered; default costeer/ledger.jsonl in the user's state folder.")
    ] = None,
    no_ledger: Annotated[bool, typer.Option("--no-ledger", help="Enter nothing anywhere.")] = False,
    gateway: Annotated[
        str | None, typer.Option(help="Serve the OpenAI API to this device's apps on this host:port; they are steered by it.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Where the gateway forwards to: http://server:8000/v1.")] = None,
    gateway_key: Annotated[
        str | None, typer.Option(envvar="COSTEER_GATEWAY_KEY", help="The key that apps must have; due beyond loopback.")
    ] = None,
    server_key: Annotated[
        str | None, typer.Option(envvar="COSTEER_SERVER_KEY", help="The server's API key, instead of the apps' own.")
    ] = None,
) -> None:
    """Attach this device: run the small model on the private context and answer the hub."""
    if command.invoked_subcommand is not None:
        return
    if hub is None or name is None or model is None:
        missing = [option for option, value in (("--hub", hub), ("--name", name), ("--model", model)) if value is None]
        raise typer.BadParameter("must be given", param_hint=" ".join(missing))
    from costeer_vllm.edge.ledger import default_path
    from costeer_vllm.edge.settings import EdgeSettings, gateway_settings
    from costeer_vllm.edge.worker import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log a line for each request
    settings = EdgeSettings(
        hub=hub,
        name=name,
        model=model,
        context=None if context is None else str(context),
        contexts=None if contexts is None else str(contexts),
        context_tokens=context_tokens,
        reranker=reranker,
        template=None if template is None else str(template),
        attach_key=attach_key,
        steering_key=key,
        delta=delta,
        dtype=dtype,
        device=device,
        max_streams=max_streams,
        look_ahead=look_ahead,
        threads=threads,
        tokens_only=tokens_only,
        max_bits=max_bits,
        ledger=None if no_ledger else str(ledger or default_path()),
        gateway=gateway_settings(gateway, server, gateway_key, server_key),
    )
    raise typer.Exit(run(settings))


@edges.command("ledger")
def show_ledger(
    file: Annotated[Path | None, typer.Option("--ledger", help="The ledger, if it is not at its usual place.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Entries to show, the newest.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="Draw the bits of all entries to this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the entries as lines of JSON.")] = False,
) -> None:
    """Show what this device's answers can have told about its context, and what left it."""
    from costeer_vllm.edge.ledger import default_path, read
    from costeer_vllm.edge.ledger_view import draw, print_json, print_table

    entries = read(file or default_path())
    if json:
        print_json(entries[-last:])
    else:
        print_table(entries, last)
    if plot is not None:
        draw(entries, plot)


@app.command()
def demo(
    T: Annotated[int, typer.Option("--T", min=1, help="Iterations of Eq. 7; the default is what the demo's scores favor.")] = 1,
    profiles: Annotated[int, typer.Option(min=1, max=8, help="Edge workers to start, each with 25 queries.")] = 2,
    rows: Annotated[int, typer.Option(min=1, max=200, help="Held-out queries for the offline scores.")] = 200,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON last, everything else to stderr.")] = False,
    export: Annotated[Path | None, typer.Option(help="Only write the pair, contexts and queries to this folder.")] = None,
) -> None:
    """Show it all on this machine: real vLLM, hub, edge workers and API with two tiny models that come with the package."""
    from costeer_vllm.demo import export as exporting

    if export is not None:
        print(exporting.export(export))
        return
    from costeer_vllm.demo.served import run_demo

    run_demo(T, profiles, rows, json)


@app.command()
def bench(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables to this file, or between its marks if it has them.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw pictures (PNG) in this folder.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Parts, with commas between them: phases, round-trips, neighbors, hub, kernel.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it runs: no figure is worth anything.")] = False,
    streams: Annotated[str, typer.Option(help="Streams at a time: numbers with commas between them.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(help="Tokens per stream, or less where streams are many.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Of every phase, in turns.")] = 5,
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 151_936,
    serial_tokens: Annotated[int, typer.Option(help="Tokens per repetition of the serial loop.")] = 16,
    delta: Annotated[Literal["lossless", "sparse"], typer.Option(help="How deltas are encoded.")] = "sparse",
) -> None:
    """Measure steering on this machine: plain vLLM, the paper's serial loop, distance, a slow device, the hub, the kernel."""
    from costeer_vllm.bench.run import PARTS, Outputs, run_bench
    from costeer_vllm.bench.settings import QUICK, BenchSettings, parse_parts, parse_streams

    settings = QUICK if quick else BenchSettings(parse_streams(streams), tokens, repetitions, vocab, serial_tokens, delta)
    run_bench(settings, parse_parts(only, list(PARTS)), Outputs(json, markdown, plots))


def main() -> None:
    """Entry point: errors of ours are one sentence and exit code 1, not a traceback."""
    try:
        app()
    except CoSteerError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
