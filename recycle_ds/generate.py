"""Entry point: continues a prompt. `python -m recycle_ds.generate --model DIR --prompt TEXT --mode verified`.

stdout holds the continuation and nothing else (with --json one object); figures, logs and errors go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from recycle_ds.config.command import INTERRUPTED, run_command, user_errors

if TYPE_CHECKING:
    from recycle_ds.inference import Generation, SamplingParams
    from recycle_ds.inference.console import TokenPrinter

# What a shell reports of a program ended by SIGPIPE: the reader of stdout, `head` perhaps, had enough.
_BROKEN_PIPE = 141

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def generate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder or checkpoint.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue, raw; - reads stdin.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the text to continue, raw.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="autoregressive, alternate (the paper) or verified (lossless).")
    ] = "verified",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to add.")] = 128,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Recycled tokens per full call; by default 1 in alternate, adaptive in verified."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32 or bf16.")] = "fp32",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above 0 samples.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach P together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Drop tokens below P times the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 disfavours tokens already in the text.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token_ids and figures.")
    ] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Continue a prompt with a RecycleGPT, recycling the model's own states."""
    first = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))) == "0"
    with user_errors(speak=first):
        _check_single_process()
        text = _read_prompt(prompt, prompt_file)
        from recycle_ds.inference.console import private_stdout
        from recycle_ds.inference.sampling import SamplingParams

        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        try:
            with private_stdout() as out:
                request = _Request(
                    model, text, mode, max_new_tokens, draft_tokens, dtype, params, tuple(stop or ()), threads
                )
                interrupted = request.run(out, as_json)
        except BrokenPipeError:
            sys.exit(_BROKEN_PIPE)
        if interrupted:
            sys.exit(INTERRUPTED)


class _Request:
    """One prompt to continue, as asked for on the command line."""

    def __init__(
        self,
        model: str,
        prompt: str,
        mode: str,
        max_new_tokens: int,
        draft_tokens: int | None,
        dtype: str,
        params: SamplingParams,
        stop: tuple[str, ...],
        threads: int | None,
    ) -> None:
        """Raises DecodingError for what can be seen without the model, which may take long to load."""
        from recycle_ds.inference.decoder import check_mode
        from recycle_ds.inference.errors import DecodingError
        from recycle_ds.inference.setup import check_runtime
        from recycle_ds.inference.stopping import check_stop_strings

        check_mode(mode)
        check_stop_strings(stop)
        check_runtime(dtype, threads)
        if max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        self.model, self.prompt, self.mode, self.dtype, self.threads = model, prompt, mode, dtype, threads
        self.max_new_tokens, self.draft_tokens, self.params, self.stop = max_new_tokens, draft_tokens, params, stop

    def run(self, out: TextIO, as_json: bool) -> bool:
        """Decodes and prints. Returns whether Ctrl-C cut it short."""
        from recycle_ds.data.tokenizer import TextStream
        from recycle_ds.inference import DecodingInterrupted
        from recycle_ds.inference.console import TokenPrinter, figures_line, wants_colour
        from recycle_ds.inference.setup import decoder_of, load

        loaded = load(self.model, self.dtype, self.threads)
        tokenizer = loaded.tokenizer
        colour = not as_json and wants_colour(out)
        eos_ids = frozenset({tokenizer.eos_id})
        printer = TokenPrinter(TextStream(tokenizer), self.stop, eos_ids, self.mode, None if as_json else out, colour)
        interrupted = False
        try:
            generation = decoder_of(loaded).generate(
                tokenizer.encode(self.prompt),
                self.mode,
                self.params,
                max_new_tokens=self.max_new_tokens,
                draft_tokens=self.draft_tokens,
                stop=self.stop,
                on_tokens=printer.feed,
            )
        except DecodingInterrupted as cut:
            generation, interrupted = cut.generation, True
        printer.finish()
        if as_json:
            out.write(json.dumps(self._record(generation, printer), ensure_ascii=False) + "\n")
        elif out.isatty():
            out.write("\n")
        out.flush()
        print(figures_line(generation, self.mode, colour), file=sys.stderr, flush=True)
        return interrupted

    def _record(self, generation: Generation, printer: TokenPrinter) -> dict[str, object]:
        return {
            "text": printer.text,
            "token_ids": list(generation.token_ids),
            "recycled": list(generation.recycled),
            "mode": self.mode,
            "dtype": self.dtype,
            **generation.figures(),
        }


def _check_single_process() -> None:
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.parallel.rendezvous import detect_launch, quiet_libraries

    quiet_libraries()  # before what warns on import
    if detect_launch(os.environ).world_size > 1:
        raise DecodingError("decoding over several ranks is not available yet: run one process")


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text to continue, exactly as given. Raises DecodingError."""
    from recycle_ds.inference.errors import DecodingError

    if (prompt is None) == (prompt_file is None):
        raise DecodingError("give the prompt once: --prompt TEXT, --prompt - to read stdin, or --prompt-file FILE")
    try:
        if prompt_file is not None:
            text = Path(prompt_file).read_bytes().decode("utf-8")
        elif prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            assert prompt is not None
            prompt.encode("utf-8")  # bytes of the command line that are no UTF-8 arrive as lone surrogates
            text = prompt
    except OSError as error:
        raise DecodingError(f"prompt file {prompt_file!r} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise DecodingError("the prompt is not valid UTF-8: convert it first (iconv -t utf-8)") from None
    if not text:
        raise DecodingError("the prompt is empty: give at least one character")
    return text


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    run_command(app, argv)


if __name__ == "__main__":
    main()
