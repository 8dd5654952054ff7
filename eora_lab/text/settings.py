"""Which texts, how many tokens: the settings that commands, cells and notebooks share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """Which texts the input statistics are measured on."""

    source: str = "pydoc"
    """pydoc (embedded, no network), mmlu-exemplars, wikitext2, c4, arc, mathqa, gsm8k, mmlu, self (text sampled from
    the model), a text file, a split (wikitext2:validation) or a mix (arc+c4)"""
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

    def batches(self, model, tokenizer):
        """(nsamples, seqlen) token ids."""
        from eora_lab.text.tokens import calibration_batches, token_windows

        if self.first:
            return token_windows(tokenizer, self.source, self.nsamples, self.seqlen)
        return calibration_batches(
            tokenizer, self.source, self.nsamples, self.seqlen, self.seed, share=self.share, model=model
        )


@dataclass(frozen=True)
class Evaluation:
    """Which text perplexity is measured on."""

    source: str = "pydoc:heldout"
    """a text source and split, such as wikitext2:test, or a text file"""
    windows: int = 20
    """how many windows, from the start of the text"""
    seqlen: int = 512
    """tokens a window"""

    def tokens(self, tokenizer):
        """(windows, seqlen) token ids."""
        from eora_lab.text.tokens import token_windows

        return token_windows(tokenizer, self.source, self.windows, self.seqlen)
