"""Which texts, how many tokens: the settings that commands, cells and notebooks share.

This file does not import torch: commands show these settings before anything is computed.
"""

from typing import TYPE_CHECKING

from eora_lab.errors import EoraLabError, at_least, check_seed, settings

if TYPE_CHECKING:
    import torch


@settings
class Calibration:
    """Which texts the input statistics are measured on."""

    source: str = "pydoc"
    """pydoc (embedded, no network), mmlu-exemplars, wikitext2, c4, arc, mathqa, gsm8k, mmlu, self (text sampled from
    the model), a text file, a column of a JSONL, JSON, CSV or Parquet file (rows.jsonl:text; chats go through the
    model's template), a split (wikitext2:validation) or a mix (arc+c4)"""
    column: str | None = None
    """the column of a file that source names without one"""
    nsamples: int = 32
    """sequences"""
    seqlen: int = 512
    """tokens a sequence"""
    share: float = 0.5
    """share of the first source in a mix"""
    first: bool = False
    """take the first windows of the text in order, in place of random ones"""
    seed: int = 0
    """seed of the random windows"""

    def check(self) -> None:
        """Raise EoraLabError when a number is out of range."""
        at_least(1, nsamples=self.nsamples, seqlen=self.seqlen)
        check_seed(self.seed)
        if not 0 < self.share < 1:
            raise EoraLabError(f"share must lie between 0 and 1, not {self.share}")

    @property
    def text(self) -> str:
        """The source with its column."""
        from eora_lab.text.read import with_column

        return with_column(self.source, self.column) if self.column else self.source

    def batches(self, model: "torch.nn.Module", tokenizer) -> "torch.Tensor":
        """Token ids (nsamples, seqlen). model: the uncompressed one, which the source "self" samples from."""
        from eora_lab.text.tokens import calibration_batches, token_windows

        if self.column is not None and self.text == self.source:
            raise EoraLabError(f"the column is {self.column!r}, but {self.source} names no file without a column")
        if self.first:
            return token_windows(tokenizer, self.text, self.nsamples, self.seqlen)
        return calibration_batches(
            tokenizer, self.text, self.nsamples, self.seqlen, self.seed, share=self.share, model=model
        )


@settings
class Evaluation:
    """Which texts perplexity is measured on."""

    perplexity: tuple[str, ...] = ("pydoc:heldout",)
    """texts: sources with a split, such as wikitext2:test, text files, or columns of files (rows.jsonl:text)"""
    windows: int | None = 20
    """how many windows, from the start of each text; None: all"""
    window_length: int = 512
    """tokens a window"""

    def check(self) -> None:
        """Raise EoraLabError when a number is out of range."""
        at_least(1, windows=self.windows)
        at_least(2, window_length=self.window_length)

    def tokens(self, tokenizer) -> "dict[str, torch.Tensor]":
        """Text -> token ids (windows, window_length)."""
        from eora_lab.text.tokens import token_windows

        return {text: token_windows(tokenizer, text, self.windows, self.window_length) for text in self.perplexity}
