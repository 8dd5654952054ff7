"""`eora-lab chat`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from eora_lab.cli.options import Loading

HELP = """\
/adapter          the adapters, and which one is in use
/adapter NAME     switch to one; own: that of the run folder, off: none
/each MESSAGE     the answer with every adapter and with none, in one batch; no part of the conversation
/reset            start a new conversation
/help             this text
/quit             leave (as does the end of the input; Ctrl-C stops an answer)"""


@dataclass(frozen=True)
class Chat:
    """Talk with a model or a run folder; switch between task adapters without loading the model again.

    Reads messages line by line, from a terminal or a pipe. A line that starts with / is a command; /help lists them.
    """

    model: Annotated[str, tyro.conf.Positional]
    """embedded model, hub id, model folder, or run folder"""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER of PEFT adapters for a run folder's compressed model; the first one is in use at the start"""
    tokens: int = 256
    """how many tokens an answer has at the most"""
    temperature: float = 0.0
    """0: always the likeliest token"""
    seed: int = 0
    """seed of the sampling"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)

    def run(self) -> None:
        from transformers import TextStreamer

        from eora_lab.errors import EoraLabError
        from eora_lab.layer.linear import compensated
        from eora_lab.model import generate
        from eora_lab.run.adapters import Adapters

        folders = dict(named(text) for text in self.adapter)
        model, tokenizer = self.loading.load(self.model)
        chat = generate.Chat(model, tokenizer, self.tokens, self.temperature, self.seed)
        adapters = Adapters(model, folders) if compensated(model) or folders else None
        if adapters and folders:
            adapters.use(next(iter(folders)))
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        print("/help lists the commands, /quit leaves")
        while (line := read_line(f"{adapters.active or 'off'}> " if adapters else "> ")) is not None:
            command, _, argument = line.partition(" ")
            try:
                if command == "/quit":
                    return
                elif command == "/help":
                    print(HELP)
                elif command == "/reset":
                    chat.reset()
                    print("a new conversation")
                elif command == "/adapter":
                    print(switch(adapters, argument.strip()))
                elif command == "/each":
                    each(adapters, chat, argument.strip())
                elif command.startswith("/"):
                    print(f"no command {command}; /help lists them")
                elif line:
                    chat.reply(line, streamer)
            except EoraLabError as error:
                print(f"eora-lab: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped, and left out of the conversation)")


def named(text: str) -> tuple[str, str]:
    """NAME=FOLDER as a pair. Raises EoraLabError when it is none."""
    from eora_lab.errors import EoraLabError

    name, _, folder = text.partition("=")
    if not name or not folder:
        raise EoraLabError(f"--adapter {text!r}: write NAME=FOLDER, such as arc=adapters/arc")
    return name, folder


def switch(adapters, name: str) -> str:
    """Switch adapters if a name is given. Says which one is in use."""
    from eora_lab.run.adapters import OFF

    if adapters is None:
        return "this model is not compressed: it has no adapters"
    if name:
        adapters.use(None if name == OFF else name)
    return f"in use: {adapters.active or OFF}; there are {', '.join((*adapters.names, OFF))}"


def each(adapters, chat, message: str) -> None:
    """Print the answer with every adapter, and with none. Raises EoraLabError as `Chat.reply`."""
    from eora_lab.run.adapters import OFF

    if adapters is None:
        print("this model is not compressed: it has no adapters")
    elif not message:
        print("/each wants a message after it")
    else:
        names = [*adapters.names, None]
        with adapters.batch(names):
            answers = chat.ask(message, len(names))
        for name, answer in zip(names, answers, strict=True):
            print(f"{name or OFF}> {answer}")


def read_line(prompt: str) -> str | None:
    """The next line without its blanks, or None at the end. A prompt is shown on a terminal only."""
    from eora_lab.errors import EoraLabError

    try:
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip() if line else None
        return input(prompt).strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise EoraLabError("the input is not UTF-8 text: write it again in UTF-8") from error
