"""The command line: `gemloupe generate`, `chat`, `serve`, `inspect`, `convert`, `compare`, …"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gemloupe.checkpoint import DEMO_NAMES
from gemloupe.errors import did_you_mean

if TYPE_CHECKING:
    from gemloupe.conversation import Conversation
    from gemloupe.documents import Pack
    from gemloupe.model import Model
    from gemloupe.output import Output
    from gemloupe.stream import Stream

COMMANDS = (
    "generate",
    "chat",
    "transcribe",
    "serve",
    "batch",
    "inspect",
    "convert",
    "compare",
    "perplexity",
    "eval",
    "bench",
    "doctor",
)
_DEFAULT_MODEL = "demo:edge"
_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 130
_DIM, _PLAIN = "\033[2m", "\033[0m"

WELCOME = """\
gemloupe runs the Gemma 4 family on CPUs and lets you see inside. Five things to try:

  gemloupe generate "What is 27 + 45?"     an answer from a tiny model inside the package
  gemloupe chat                            a conversation with it
  gemloupe inspect demo:moe                what a model is made of, and what it weighs
  gemloupe doctor                          which models this machine can run, and how fast
  python -c 'import gemloupe as gl; print(gl.load("demo:edge").chat("What is 27 + 45?"))'

gemloupe COMMAND --help shows the options of a command, with examples. Instead of demo:edge,
a model may be a folder with a transformers checkpoint, a GGUF file, or a hub id such as
google/gemma-4-E2B-it; "gemloupe serve" answers OpenAI's and Ollama's clients with it,
"gemloupe batch" a file of requests, "gemloupe transcribe" writes speech down, "gemloupe convert"
makes it four times smaller and quicker to load, "gemloupe bench" measures how fast it is here,
"gemloupe perplexity" and "gemloupe eval" how good it is, and "gemloupe compare" finds where it
parts from a reference."""

_GENERATE_EXAMPLES = """\
examples:
  gemloupe generate "What is 27 + 45?"
  gemloupe generate "What is 27 + 45?" --thinking --temperature 0
  gemloupe generate "Name a colour and its hex code." --json-schema colour.schema.json
  gemloupe generate "Once upon a time" --raw --max-new-tokens 40 --seed 7
  gemloupe generate "Why is the sky blue?" --model google/gemma-4-E2B-it
  gemloupe generate "Hi" --model google/gemma-4-E2B-it --adapter ./my-lora:0.8
  echo "Sort: 3 1 2" | gemloupe generate --json"""

_CHAT_EXAMPLES = """\
examples:
  gemloupe chat
  gemloupe chat --model google/gemma-4-E2B-it --system "Answer in one sentence."
  gemloupe chat --thinking --max-thinking-tokens 200 --seed 7
  gemloupe chat --model ./e2b-int4 --with src notes.md "report.pdf#page=1-20"

In the chat, /help lists the commands. Ctrl-C stops a reply, Ctrl-D or /exit ends the chat."""

_TRANSCRIBE_EXAMPLES = """\
examples:
  gemloupe transcribe talk.mp3 --model google/gemma-4-E2B-it
  gemloupe transcribe talk.wav --model ./e2b-int4 --language German --translate-to English
  gemloupe transcribe talk.flac --model ./e2b-int4 --times

Sound of any length, rate and number of channels, read piece by piece (needs gemloupe[media])."""

_INSPECT_EXAMPLES = """\
examples:
  gemloupe inspect demo:moe
  gemloupe inspect google/gemma-4-E2B-it
  gemloupe inspect ./my-checkpoint
  gemloupe inspect gemma-4-E2B-it-Q4_0.gguf --mmproj mmproj-gemma-4-E2B-it-f16.gguf
  gemloupe inspect --verify ./my-packed-checkpoint"""

_CONVERT_EXAMPLES = """\
examples:
  gemloupe convert google/gemma-4-E2B-it e2b-int4
  gemloupe convert ./my-checkpoint my-int8 --dtype int8
  gemloupe convert ./my-checkpoint my-int4 --keep "*.mlp.down_proj.weight=int8"
  gemloupe convert gemma-4-E2B-it-Q4_0.gguf e2b-q4 --dtype auto
  gemloupe convert google/gemma-4-E2B-it e2b-mine --adapter ./my-lora

The folder holds weights as the kernels read them: it loads in no time, and its pages are shared
between processes. --dtype auto keeps the values of a quantised checkpoint."""

_COMPARE_EXAMPLES = """\
examples:
  gemloupe compare demo:edge demo:edge --text "What is 27 + 45?"
  gemloupe compare ./e2b-int4 ./gemma-4-E2B-it --ids 2,818,5279,529,7001,563 --kl
  gemloupe compare ./gemma-4-E2B-it recorded.safetensors

REFERENCE is a checkpoint folder or hub id, loaded with transformers (needs gemloupe[compare]); a
file of gl.record_reference, whose prompts are used if none is given; or with --gemloupe another
model of gemloupe, GGUF files and packed folders included. The exit code is 1 if something diverges
by more than float noise explains."""

_BENCH_EXAMPLES = """\
examples:
  gemloupe bench demo:edge
  gemloupe bench ./e2b-int4 -p 512 -n 128 -d 0,4096
  gemloupe bench ./e2b-int4 -p 0 -n 64 -b 1,2,4,8 --json

Prompts are random ids. pp512: tokens a second of reading a prompt of 512; tg128: of decoding 128;
d4096: after 4096 tokens; x8: in eight rows at once. Median, least and greatest are shown."""

_PERPLEXITY_EXAMPLES = """\
examples:
  gemloupe perplexity wiki.test.raw --model ./e2b-int4
  gemloupe perplexity book.txt --model ./e2b-int4 --reference google/gemma-4-E2B-it
  gemloupe perplexity wiki.test.raw --model ./e2b-int4 --window 512 --rule llama.cpp --json

FILE is UTF-8 text. Windows of --window tokens begin every --stride tokens, each with BOS, and every
token counts once. --rule llama.cpp gives llama-perplexity's figures. With --reference, also the KL
divergence of each token's distribution, and how often both models find the same token likeliest."""

_EVAL_EXAMPLES = """\
examples:
  gemloupe eval --model_args pretrained=demo:edge,dtype=int4 --tasks arc_easy --limit 100
  gemloupe eval --model_args pretrained=./e2b-int4 --tasks gsm8k --apply_chat_template
  gemloupe eval --model_args pretrained=./e2b-int4,adapter=./my-lora --tasks wikitext
  gemloupe eval ls tasks
  gemloupe eval run --help

Arguments are those of lm-evaluation-harness (needs gemloupe[eval]), in which this command registers
"--model gemloupe"; gl.help("evaluate") says what --model_args takes."""

_DOCTOR_EXAMPLES = """\
examples:
  gemloupe doctor
  GEMLOUPE_ISA=avx2 gemloupe doctor"""

_SERVE_EXAMPLES = """\
examples:
  gemloupe serve demo:edge
  gemloupe serve google/gemma-4-E2B-it --dtype int4 --alias gemma4=google/gemma-4-E2B-it
  gemloupe serve ./e2b-int4 --host 0.0.0.0 --api-key "$KEY" --max-queue 32
  curl http://127.0.0.1:11434/v1/chat/completions -d \\
    '{"messages": [{"role": "user", "content": "What is 27 + 45?"}]}'

OpenAI's and Ollama's clients work: base_url="http://localhost:11434/v1". gl.help("serve") says what
the routes take, gl.help("security") what a stranger can send. Ctrl-C lets running requests end."""

_BATCH_EXAMPLES = """\
examples:
  gemloupe batch requests.jsonl answers.jsonl --model ./e2b-int4
  gemloupe batch prompts.jsonl answers.jsonl --temperature 0 --max-new-tokens 64 --in-order
  gemloupe batch prompts.jsonl answers.jsonl --capture layers.20.resid_post --captures arrays

A line of IN is a request of OpenAI's batches, {"custom_id": "a", "body": {"messages": [...]}}, or
{"id": "a", "prompt": "..."} or {"messages": [...]} with options such as "max_tokens" beside it.
Interrupted, by Ctrl-C or a crash, the same command goes on where it was. gl.help("cluster")."""

_CHAT_HELP = """\
/reset          forget the conversation
/system TEXT    begin anew with these instructions; without TEXT, with none
/exit           end the chat (also Ctrl-D)
/help           show this list
Ctrl-C          stop the reply"""
_CHAT_COMMANDS = ("/reset", "/system", "/exit", "/help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 after an error, 130 after Ctrl-C.

    `compare` returns 1 where the models diverge, `batch` where lines could not be answered.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or f"There are {', '.join(COMMANDS)}."
        parser.error(f"no command {argv[0]!r}. {hint[:-1]}")
    if argv[:1] == ["eval"] and len(argv) > 1 and argv[1] not in ("-h", "--help"):
        # The harness reads its own arguments.
        arguments = argparse.Namespace(command="eval", run=_run_eval, arguments=argv[1:])
    else:
        arguments = parser.parse_args(argv)
    if arguments.command is None:
        print(WELCOME)
        return 0
    _be_gentle(sys.stdout)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code: int | None = arguments.run(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return _EXIT_INTERRUPTED
        except BrokenPipeError:
            # Whoever reads our output has read enough; Python would flush into the pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _EXIT_ERROR
        except Exception as error:
            if os.environ.get("GEMLOUPE_DEBUG") == "1":
                raise
            print(f"gemloupe: error: {_one_line(error)}", file=sys.stderr)
            return _EXIT_ERROR
    return code or 0


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(text).split())
    if isinstance(error, (ValueError, TypeError, LookupError, OSError, ImportError)) and line:
        return line
    if isinstance(error, MemoryError):
        return line or "out of memory; use a smaller model, or a shorter context"
    return f"{type(error).__name__}: {line}; GEMLOUPE_DEBUG=1 shows where"


def _show_warning(message: Any, *_where: Any, **_more: Any) -> None:
    print(f"gemloupe: note: {' '.join(str(message).split())}", file=sys.stderr)


def _be_gentle(stream: TextIO) -> None:
    """Lets characters that the terminal's encoding lacks be shown as "?"."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_ERROR, f"gemloupe: error: {message}; {self.prog} --help shows its use\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="gemloupe",
        description="Runs the Gemma 4 family on CPUs, fast, and lets you see inside.",
        epilog='"gemloupe" alone shows five things to try.',
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_chat(commands)
    _add_transcribe(commands)
    _add_serve(commands)
    _add_batch(commands)
    inspect = _add_command(
        commands, "inspect", _run_inspect, "show what a model is made of", _INSPECT_EXAMPLES
    )
    inspect.add_argument(
        "source", metavar="SOURCE", help="a folder, a GGUF file, a hub id, or demo:edge"
    )
    _add_mmproj_option(inspect)
    inspect.add_argument(
        "--verify", action="store_true", help="read a packed checkpoint's tensors, check their CRCs"
    )
    _add_convert(commands)
    _add_compare(commands)
    _add_perplexity(commands)
    evaluate = _add_command(
        commands, "eval", _run_eval, "run tasks of lm-evaluation-harness", _EVAL_EXAMPLES
    )
    evaluate.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="the harness's")
    _add_bench(commands)
    _add_command(
        commands, "doctor", _run_doctor, "show what this machine can run", _DOCTOR_EXAMPLES
    )
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_rest: Any) -> None:
        from gemloupe import __version__

        print(f"gemloupe {__version__}")
        parser.exit()


def _add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands, "generate", _run_generate, "answer or continue a prompt", _GENERATE_EXAMPLES
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text; read from a pipe if left out"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    form.add_argument(
        "--chat",
        action="store_true",
        help="wrap it as a chat message (what a model with a chat template does anyway)",
    )
    _add_model_options(parser)
    _add_sampling_options(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show text as it comes (default: on a terminal)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_chat(commands: Any) -> None:
    parser = _add_command(commands, "chat", _run_chat, "talk with a model", _CHAT_EXAMPLES)
    _add_model_options(parser)
    _add_document_options(parser)
    _add_sampling_options(parser)


def _add_document_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--with",
        dest="documents",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="text, code and PDF files, and folders of them, to talk about",
    )
    group.add_argument(
        "--max-document-tokens",
        type=_positive,
        metavar="N",
        help="of all documents (default: seven eighths of what the model reads)",
    )
    group.add_argument(
        "--pages",
        choices=("text", "images"),
        default="text",
        help="how the model reads PDFs; images need a model that sees (default: text)",
    )
    group.add_argument(
        "--page-tokens",
        type=_positive,
        default=280,
        metavar="N",
        help="soft tokens of a page as image: 70, 140, 280, 560 or 1120 (default: 280)",
    )
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="don't keep what was read on disk, and read everything anew",
    )


def _add_serve(commands: Any) -> None:
    parser = _add_command(
        commands, "serve", _run_serve, "answer OpenAI's and Ollama's clients", _SERVE_EXAMPLES
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=_DEFAULT_MODEL,
        help=f"a folder, a GGUF file, a hub id, or demo:edge (default: {_DEFAULT_MODEL})",
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, int8 or int4 (default: auto)"
    )
    group.add_argument("--threads", type=int, help="default: every CPU this process may use")
    _add_mmproj_option(group)
    _add_adapter_option(group, "load a LoRA adapter of PEFT, which requests may name")
    group.add_argument("--name", metavar="NAME", help="what clients call the model")
    group.add_argument(
        "--drafter",
        metavar="CHECKPOINT",
        help="an assistant of MODEL, which guesses its tokens, or prompt-lookup",
    )
    group.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="TAG=CHECKPOINT",
        help="another name, of MODEL or of a further one; may be given several times",
    )
    group = parser.add_argument_group("access")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    group.add_argument("--port", type=int, default=11434, metavar="N", help="default: 11434")
    group.add_argument("--api-key", metavar="KEY", help="also from GEMLOUPE_API_KEY")
    group.add_argument(
        "--no-api-key", action="store_true", help="let anybody who reaches --host use the model"
    )
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server"
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page that may call from browsers, such as https://example.org",
    )
    group.add_argument(
        "--adapter-dir", metavar="FOLDER", help="where clients may load adapters from"
    )
    group.add_argument("--no-page", action="store_true", help="serve no web page at /")
    group = parser.add_argument_group("limits")
    for flag, default, text in (
        ("--max-rows", 8, "answers that are generated at once"),
        ("--max-queue", 64, "answers that wait; more are refused with 429"),
        ("--max-body", 16 << 20, "bytes of a request"),
        ("--max-schema", 64 << 10, "bytes of a JSON schema"),
        ("--max-new-tokens", 4096, "tokens of an answer"),
        ("--max-prompt", None, "tokens of a prompt (default: what the model reads)"),
        ("--kv-memory", None, "bytes for keys and values (default: half of what is free)"),
        (
            "--prefix-cache",
            None,
            "bytes for what prompts begin with, 0 for none (default: a tenth of what is free, at "
            "most 4 GiB)",
        ),
        ("--drain", 30, "seconds that answers have to end after Ctrl-C"),
    ):
        shown = text if default is None else f"{text} (default: {default})"
        kind = _not_negative if flag == "--prefix-cache" else _positive
        group.add_argument(flag, type=kind, default=default, metavar="N", help=shown)


def _add_batch(commands: Any) -> None:
    parser = _add_command(
        commands, "batch", _run_batch, "answer the requests of a JSONL file", _BATCH_EXAMPLES
    )
    parser.add_argument("source", metavar="IN", help="a file with a request a line")
    parser.add_argument("destination", metavar="OUT", help="the file that gets the answers")
    _add_model_options(parser)
    group = parser.add_argument_group("requests", "What lines get that don't say it themselves.")
    group.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="default: 256"
    )
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--seed", type=int, metavar="N", help="of the first line; it counts up")
    group.add_argument("--thinking", action="store_true", help="let the model think first")
    group.add_argument(
        "--capture", action="append", metavar="POINT", help="may be given several times"
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--captures", metavar="FOLDER", help="write captures there, as safetensors files"
    )
    group.add_argument("--in-order", action="store_true", help="write answers in the order of IN")
    group.add_argument("--restart", action="store_true", help="forget the answers that OUT has")
    group.add_argument(
        "--max-rows", type=_positive, default=8, metavar="N",
        help="answers that are generated at once (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--kv-memory", type=_positive, metavar="N",
        help="bytes for keys and values (default: half of what is free)",
    )  # fmt: skip


def _run_batch(arguments: argparse.Namespace) -> int:
    from gemloupe.batch import run_batch

    names = ("temperature", "top_p", "top_k", "seed", "capture")
    given = {name: getattr(arguments, name) for name in names}
    defaults = {name: value for name, value in given.items() if value is not None}
    if arguments.thinking:
        defaults["thinking"] = True
    result = run_batch(
        _load(arguments),
        arguments.source,
        arguments.destination,
        defaults={**defaults, "max_tokens": arguments.max_new_tokens},
        captures=arguments.captures,
        in_order=arguments.in_order,
        restart=arguments.restart,
        max_rows=arguments.max_rows,
        kv_bytes=arguments.kv_memory,
    )
    print(f"{arguments.destination}: {result}", file=sys.stderr)
    return 1 if result.failed else 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _run_serve(arguments: argparse.Namespace) -> None:
    from gemloupe.serving.command import Options, is_loopback, serve
    from gemloupe.serving.limits import Access, Limits

    aliases = {}
    for alias in arguments.alias:
        tag, equals, checkpoint = alias.partition("=")
        if not equals or not tag or not checkpoint:
            raise ValueError(
                f"--alias is {alias!r}; expected TAG=CHECKPOINT, such as gemma4=./e2b-int4"
            )
        aliases[tag] = checkpoint
    limits = Limits(
        max_rows=arguments.max_rows,
        max_queue=arguments.max_queue,
        max_body=arguments.max_body,
        max_schema=arguments.max_schema,
        max_prompt=arguments.max_prompt,
        max_new_tokens=arguments.max_new_tokens,
        kv_bytes=arguments.kv_memory,
        prefix_bytes=arguments.prefix_cache,
    )
    # A page whose name was pointed at this machine is not to read what only this machine may.
    hosts = tuple(arguments.allow_host)
    if is_loopback(arguments.host):
        hosts = (arguments.host, *hosts)
    access = Access(
        api_key=arguments.api_key or os.environ.get("GEMLOUPE_API_KEY") or None,
        anybody=arguments.no_api_key,
        hosts=hosts,
        origins=tuple(arguments.allow_origin),
        page=not arguments.no_page,
        adapter_folder=Path(arguments.adapter_dir) if arguments.adapter_dir else None,
    )
    serve(
        arguments.model,
        Options(
            host=arguments.host,
            port=arguments.port,
            name=arguments.name,
            aliases=aliases,
            load={"dtype": arguments.dtype, "threads": arguments.threads},
            mmproj=_mmproj(arguments),
            adapters=_adapters(arguments) or {},
            drafter=arguments.drafter,
            limits=limits,
            access=access,
            drain=arguments.drain,
        ),
    )


def _add_transcribe(commands: Any) -> None:
    parser = _add_command(
        commands, "transcribe", _run_transcribe, "write down speech", _TRANSCRIBE_EXAMPLES
    )
    parser.add_argument("audio", metavar="FILE", help="a sound file, or - for one from a pipe")
    parser.add_argument("--language", metavar="NAME", help="what is spoken, such as German")
    parser.add_argument(
        "--translate-to", metavar="NAME", help="print a translation below each piece"
    )
    parser.add_argument("--times", action="store_true", help="begin each piece with its times")
    _add_model_options(parser, default="demo:media")  # The demo model that hears.
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of a piece")


def _add_convert(commands: Any) -> None:
    parser = _add_command(
        commands, "convert", _run_convert, "write a quantised, packed checkpoint", _CONVERT_EXAMPLES
    )
    parser.add_argument(
        "source", metavar="SRC", help="a folder, a GGUF file, a hub id, or demo:edge"
    )
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    parser.add_argument(
        "--dtype", default="int4", help="int4, int8, bfloat16, float32 or auto (default: int4)"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN=DTYPE",
        help="another dtype for tensors of these names; may be given several times",
    )
    _add_adapter_option(parser, "bake in a LoRA adapter of PEFT")
    parser.add_argument("--force", action="store_true", help="replace a packed checkpoint at DST")
    parser.add_argument("--threads", type=int, help="default: every CPU this process may use")


def _add_compare(commands: Any) -> None:
    parser = _add_command(
        commands,
        "compare",
        _run_compare,
        "find where a model and a reference part, and why",
        _COMPARE_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or demo:edge")
    parser.add_argument("reference", metavar="REFERENCE", help="what it is compared with")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--text", action="append", metavar="TEXT", help="raw text; may be given several times"
    )
    inputs.add_argument("--ids", type=_numbers, metavar="N,…", help="token ids, taken as given")
    parser.add_argument(
        "--dtype", default="auto", help="of the model: auto, float32, bfloat16, int8 or int4"
    )
    parser.add_argument(
        "--reference-dtype", default="float32", help="of the reference (default: float32)"
    )
    parser.add_argument(
        "--gemloupe", action="store_true", help="load the reference with gemloupe too"
    )
    _add_adapter_option(parser, "run the model under a LoRA adapter, and the reference without")
    parser.add_argument("--points", default="*", metavar="PATTERN", help="hook points to compare")
    parser.add_argument("--layer", type=int, metavar="N", help="show the points of one layer")
    parser.add_argument(
        "--kl", action="store_true", help="measure the KL of each rounded tensor alone"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the errors into this picture")


def _add_perplexity(commands: Any) -> None:
    parser = _add_command(
        commands, "perplexity", _run_perplexity, "measure how well a model predicts a text",
        _PERPLEXITY_EXAMPLES,
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="a text file, or - for one from a pipe")
    _add_model_options(parser)
    group = parser.add_argument_group("measure")
    group.add_argument(
        "--reference", metavar="MODEL", help="measure the divergence from this model too"
    )
    group.add_argument(
        "--reference-dtype", default="auto", help="auto, float32, bfloat16, int8 or int4"
    )
    group.add_argument(
        "--window", type=_positive, default=2048, metavar="N", help="tokens (default: 2048)"
    )
    group.add_argument(
        "--stride", type=_positive, metavar="N", help="tokens (default: half of the window)"
    )
    group.add_argument("--rule", default="strided", help="strided or llama.cpp (default: strided)")
    group.add_argument(
        "--max-tokens", type=_positive, metavar="N", help="read only the first tokens of FILE"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands, "bench", _run_bench, "measure a model's speed here", _BENCH_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or demo:edge")
    for flag, default, text in (
        ("-p", "512", "tokens of prompts"),
        ("-n", "128", "tokens to decode"),
        ("-d", "0", "tokens in the cache before"),
        ("-b", "1", "rows at once"),
    ):
        parser.add_argument(
            flag,
            type=_numbers,
            default=_numbers(default),
            metavar="N,…",
            help=f"{text} (default: {default})",
        )
    parser.add_argument("-t", dest="threads", type=int, metavar="N", help="threads (default: all)")
    parser.add_argument("-r", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--dtype", default="auto", help="as stored, or as it is to be loaded")
    parser.add_argument("--kv-dtype", default="auto", help="float32, float16, bfloat16 or int8")
    _add_adapter_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a test")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 1,4") from None


def _add_model_options(parser: argparse.ArgumentParser, default: str = _DEFAULT_MODEL) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=default,
        help="a folder, a .gguf file, a hub id, or "
        f"{', '.join(f'demo:{name}' for name in DEMO_NAMES)} (default: {default})",
    )
    group.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, int8 or int4 (default: auto)"
    )
    group.add_argument("--threads", type=int, help="default: every CPU this process may use")
    _add_mmproj_option(group)
    _add_adapter_option(group)


def _add_mmproj_option(parser: Any) -> None:
    parser.add_argument(
        "--mmproj",
        metavar="FILE",
        default="auto",
        help="the towers of a GGUF model (default: the only mmproj-*.gguf beside it), or none",
    )


def _mmproj(arguments: argparse.Namespace) -> str | None:
    return None if arguments.mmproj == "none" else arguments.mmproj


def _add_adapter_option(parser: Any, what: str = "run under a LoRA adapter of PEFT") -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        metavar="PATH[:SCALE]",
        help=f"{what}: a folder or hub id; may be given several times",
    )


def _adapter(text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return text, 1.0  # The colon belongs to the path.


def _adapters(arguments: argparse.Namespace) -> dict[str, float] | None:
    given = arguments.adapter
    if given and len(dict(given)) < len(given):
        raise ValueError("--adapter gives one path twice; expected each once, as PATH:SCALE")
    return dict(given) if given else None


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "generation", "Options left out are as the model's generation_config.json says."
    )
    group.add_argument("--system", metavar="TEXT", help="instructions that come first")
    group.add_argument("--thinking", action="store_true", help="let the model think first")
    group.add_argument(
        "--max-thinking-tokens", type=int, metavar="N", help="end thoughts that get longer"
    )
    group.add_argument(
        "--json-schema", metavar="FILE", help="make answers follow the JSON schema in this file"
    )
    group.add_argument("--max-new-tokens", type=int, default=None, metavar="N")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N", help="0 is off")
    group.add_argument("--min-p", type=float, metavar="X")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="may be given several times"
    )


def _load(arguments: argparse.Namespace) -> Model:
    from gemloupe.model import load

    return load(
        arguments.model,
        arguments.dtype,
        threads=arguments.threads,
        adapter=_adapters(arguments),
        mmproj=_mmproj(arguments),
    )


def _options(arguments: argparse.Namespace, default_tokens: int) -> dict[str, Any]:
    options = {
        name: getattr(arguments, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
    }
    if arguments.max_thinking_tokens is not None:
        options["max_thinking_tokens"] = arguments.max_thinking_tokens
    if arguments.json_schema is not None:
        from gemloupe import strict_json

        options["response_format"] = strict_json.read_object(Path(arguments.json_schema))
    tokens = arguments.max_new_tokens
    return {**options, "max_new_tokens": default_tokens if tokens is None else tokens}


def _system(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


def _run_generate(arguments: argparse.Namespace) -> None:
    if arguments.json and arguments.stream:
        raise ValueError("--json prints one object at the end; leave out --stream")
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError('no prompt; give one, such as: gemloupe generate "What is 27 + 45?"')
        prompt = sys.stdin.read().rstrip("\n")
    model = _load(arguments)
    raw = arguments.raw or (model.tokenizer.chat_template.is_default and not arguments.chat)
    if raw and (arguments.thinking or arguments.system):
        raise ValueError(
            "--thinking and --system need a chat, but the prompt is raw text; "
            + ("leave out --raw" if arguments.raw else "add --chat")
        )
    model.tokenizer.raw_text_warned = True  # --raw says that it is meant.
    x = prompt if raw else [*_system(arguments), {"role": "user", "content": prompt}]
    stream: Any = model.generate(
        x, thinking=arguments.thinking, stream=True, **_options(arguments, 256)
    )
    if arguments.json:
        print(json.dumps(_as_json(stream.result), ensure_ascii=False))
        return
    streams = sys.stdout.isatty() if arguments.stream is None else arguments.stream
    _show(stream, streams)
    _show_speed(stream.result)


def _as_json(out: Output) -> dict[str, Any]:
    times = out.timings
    return {
        "text": out.text,
        "reasoning": out.reasoning,
        "finish_reason": out.finish_reason,
        "ids": out.ids.tolist(),
        "prompt_ids": out.prompt.ids.tolist(),
        "seed": out.seed,
        "timings": {
            "prefill_tokens": times.prefill_tokens,
            "prefill_seconds": times.prefill_seconds,
            "decode_tokens": times.decode_tokens,
            "decode_seconds": times.decode_seconds,
            "time_to_first_token": times.time_to_first_token,
            "tokens_per_second": times.tokens_per_second,
        },
    }


def _show(stream: Stream, streams: bool) -> None:
    """Prints the answer to stdout; thoughts go dimmed to stderr, if that is a terminal."""
    thoughts = sys.stderr.isatty()
    if not streams:
        out: Any = stream.result
        if thoughts and out.reasoning:
            print(f"{_DIM}{out.reasoning}{_PLAIN}", file=sys.stderr)
        print(out.text)
        return
    thinking = False
    for piece in stream:
        if piece.reasoning and thoughts:
            sys.stderr.write(f"{_DIM}{piece.reasoning}{_PLAIN}")
            sys.stderr.flush()
            thinking = True
        if piece.text:
            if thinking:
                sys.stderr.write("\n")
                sys.stderr.flush()
                thinking = False
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    print()


def _show_speed(out: Output) -> None:
    if sys.stderr.isatty():
        times = out.timings
        print(
            f"{_DIM}{times.prefill_tokens} tokens read in {times.prefill_seconds:.2f} s, "
            f"{len(out.ids)} written ({times.tokens_per_second:.1f}/s){_PLAIN}",
            file=sys.stderr,
        )


def _run_transcribe(arguments: argparse.Namespace) -> None:
    from gemloupe.transcription import segments

    audio = sys.stdin.buffer.read() if arguments.audio == "-" else arguments.audio
    found = segments(
        _load(arguments),
        audio,
        arguments.language,
        arguments.translate_to,
        max_new_tokens=arguments.max_new_tokens,
        adapter=_adapters(arguments),
    )
    for segment in found:
        times = f"[{_clock(segment.begin)} - {_clock(segment.end)}] " if arguments.times else ""
        if segment.text or times:
            print(f"{times}{segment.text}".rstrip(), flush=True)
        if segment.translation:
            print(f"{' ' * len(times)}{segment.translation}", flush=True)


def _clock(seconds: float) -> str:
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def _run_inspect(arguments: argparse.Namespace) -> None:
    from gemloupe.inspect import describe, verify

    if arguments.verify:
        print(verify(arguments.source))
    else:
        print(describe(arguments.source, _mmproj(arguments)))


def _run_convert(arguments: argparse.Namespace) -> None:
    from gemloupe.conversion import convert
    from gemloupe.errors import format_bytes
    from gemloupe.packed import FILE_NAME

    dtype: dict[str, str] = {"default": arguments.dtype}
    for keep in arguments.keep:
        pattern, equals, name = keep.rpartition("=")
        if not equals or not pattern:
            raise ValueError(
                f"--keep is {keep!r}; expected PATTERN=DTYPE, such as *.mlp.down_proj.weight=int8"
            )
        dtype[pattern] = name
    folder = convert(
        arguments.source,
        arguments.destination,
        dtype if arguments.keep else arguments.dtype,
        adapter=_adapters(arguments),
        force=arguments.force,
        threads=arguments.threads,
    )
    print(f"{folder}: {format_bytes((folder / FILE_NAME).stat().st_size)}")


def _run_compare(arguments: argparse.Namespace) -> int:
    from gemloupe.comparison.compare import compare, open_reference
    from gemloupe.model import load

    if arguments.gemloupe:
        reference = open_reference(load(arguments.reference, arguments.reference_dtype))
    else:
        reference = open_reference(arguments.reference, arguments.reference_dtype)
    model = load(
        arguments.model,
        arguments.dtype,
        embed_scale=reference.embed_scale,
        adapter=_adapters(arguments),
    )
    model.tokenizer.raw_text_warned = True  # The help says that it is raw.
    inputs = arguments.ids if arguments.text is None else arguments.text
    report = compare(
        model,
        reference,
        inputs,
        points=arguments.points,
        measure="kl" if arguments.kl else "output",
    )
    print(report)
    print()
    print(report.table(arguments.layer))
    if report.contributions:
        print()
        print(report.contributions_table())
    if arguments.plot:
        report.plot().figure.savefig(arguments.plot)
    return 1 if report.first_divergence else 0


def _run_perplexity(arguments: argparse.Namespace) -> None:
    from gemloupe.model import load
    from gemloupe.perplexity import kl, perplexity

    if arguments.file == "-":
        data, name = sys.stdin.buffer.read(), "the text from the pipe"
    else:
        data, name = Path(arguments.file).read_bytes(), arguments.file
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text: byte {error.start} belongs to none") from None
    model = _load(arguments)
    options = {
        name: getattr(arguments, name) for name in ("window", "stride", "rule", "max_tokens")
    }
    result: Any
    if arguments.reference is None:
        result = perplexity(model, text, **options)
    else:
        reference = load(arguments.reference, arguments.reference_dtype, threads=arguments.threads)
        result = kl(model, reference, text, **options)
    print(json.dumps(result.as_dict()) if arguments.json else result)


def _run_eval(arguments: argparse.Namespace) -> int:
    from gemloupe.integrations import lm_eval

    return lm_eval.main(arguments.arguments)


def _run_bench(arguments: argparse.Namespace) -> None:
    from gemloupe import bench

    chosen = bench.cases(arguments.p, arguments.n, arguments.d, arguments.b)
    shows = sys.stderr.isatty()

    def advance(case: bench.Case) -> None:
        if shows:
            print(f"\r{case.name:<40}", end="", file=sys.stderr, flush=True)

    records = bench.bench(
        arguments.model,
        chosen,
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_dtype,
        threads=arguments.threads,
        adapter=_adapters(arguments),
        repetitions=arguments.r,
        advance=advance,
    )
    if shows:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    if arguments.json:
        for entry in records:
            print(json.dumps(entry, ensure_ascii=False))
    else:
        print(bench.table(records))


def _run_doctor(arguments: argparse.Namespace) -> None:
    from gemloupe.doctor import report

    print(report())


def _run_chat(arguments: argparse.Namespace) -> None:
    from gemloupe.conversation import Conversation

    model = _load(arguments)
    options = _options(arguments, 1024)
    documents = _documents(arguments, model) if arguments.documents else None
    chat = Conversation(model, arguments.system, arguments.thinking, documents, **options)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401  Line editing in input().

        print(f"{model!r}\n/help lists commands, Ctrl-C stops a reply, /exit ends the chat.")
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            print("\n/exit or Ctrl-D ends the chat.")
            continue
        if not line:
            continue
        if line.startswith("/"):
            if not _obey(chat, line):
                break
        else:
            _reply(chat, line)


def _documents(arguments: argparse.Namespace, model: Model) -> Callable[[str | None], Pack]:
    """What reads the documents under given instructions, and says what it read."""
    from gemloupe.documents import pack

    last: list[tuple[str | None, Pack]] = []

    def read(system: str | None) -> Pack:
        if last and last[0][0] == system:
            return last[0][1]
        packed = pack(
            arguments.documents,
            arguments.max_document_tokens,
            model=model,
            pages=arguments.pages,
            page_tokens=arguments.page_tokens,
            system=system,
            thinking=arguments.thinking,
            keep=not arguments.no_cache,
        )
        print(packed, file=sys.stderr)
        packed.cache()
        took = f"in {packed.fill_seconds:.2f} s, from {packed.filled_from}"
        print(f"{len(packed)} tokens read {took}", file=sys.stderr)
        last[:] = [(system, packed)]
        return packed

    return read


def _obey(chat: Conversation, line: str) -> bool:
    """Carries out a /command; False ends the chat."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        chat.reset()
        print("The conversation is forgotten.")
    elif command == "/system":
        chat.system = rest.strip() or None
        chat.reset()
        print("New instructions, new conversation." if chat.system else "No instructions.")
    elif command == "/help":
        print(_CHAT_HELP)
    else:
        hint = did_you_mean(command, _CHAT_COMMANDS)
        print(f"No command {command}. {hint} /help lists them.".replace("  ", " "))
    return True


def _reply(chat: Conversation, text: str) -> None:
    try:
        stream = chat.ask(text)
    except KeyboardInterrupt:
        print("\n(stopped)")
        return
    except (ValueError, MemoryError) as error:
        # Most likely the context is full; the chat goes on.
        print(f"gemloupe: error: {_one_line(error)} (/reset forgets the conversation)")
        return
    try:
        _show(stream, True)
    except KeyboardInterrupt:
        print("\n(stopped)")
    chat.keep(stream)


if __name__ == "__main__":
    sys.exit(main())
