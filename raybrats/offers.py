"""Code of others by name: an entry point of an installed package, or `my.module:function`."""

import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from raybrats.errors import UsageError, first_line


@dataclass(frozen=True)
class Offers:
    """The names of one kind of thing: raybrats' own, and those of others.

    Example:
        >>> offers = Offers("recipe", "raybrats.recipes", own=("tiny",))
        >>> offers.check("my.module:function")
        >>> offers.check("tinny")
        Traceback (most recent call last):
        raybrats.errors.UsageError: no recipe 'tinny'; did you mean 'tiny'? there are tiny, and ...
    """

    kind: str
    """What it is, in a word."""
    group: str
    """Group of entry points in which packages offer theirs."""
    own: tuple[str, ...]
    """Names of raybrats' own, which those of others do not replace."""
    field: str = ""
    """Field of a run that holds the name; empty for a recipe."""

    def check(self, name: str) -> None:
        """Refuses a name that stands for nothing here; nothing is imported.

        Raises:
            UsageError: the nearest name is suggested.
        """
        if name not in self.own:
            self._found(name)

    def package(self, name: str) -> str:
        """The installed package that offers a name, as `mine==1.0`; empty for raybrats' own.

        Raises:
            UsageError: none does.
        """
        if name in self.own:
            return ""
        dist = self._found(name).dist
        if dist is None:
            raise UsageError(
                f"{self.kind} {name} is of no installed package, and a registered model takes no "
                f"other code: offer it as an entry point of {self.group}"
            )
        return f"{dist.name}=={dist.version}"

    def make(self, name: str, *arguments: object) -> object:
        """What the function of this name, which is not raybrats' own, returns for some arguments.

        The module of `my.module:function` is looked for in the working directory too.

        Raises:
            UsageError: there is no such function, or it fails; with its first line.
        """
        found = self._found(name)
        if found.dist is None and (here := os.getcwd()) not in sys.path:  # as for `python -m`
            sys.path.insert(0, here)
        try:
            return found.load()(*arguments)
        except (Exception, SystemExit) as error:  # whatever the code of others raises
            raise UsageError(f"{self.kind} {name}: {first_line(error)}") from error

    def _found(self, name: str) -> EntryPoint:
        """Where the function of a name lies; it has no `dist` if it is `my.module:function`."""
        if ":" in name:
            return EntryPoint(name, name, self.group)
        found = entry_points(group=self.group, name=name)
        if len({entry.value for entry in found}) > 1:
            packages = " and ".join(entry.dist.name for entry in found if entry.dist is not None)
            raise UsageError(
                f"{self.kind} {name}: {packages} both offer one; uninstall one of them"
            )
        for entry in found:
            return entry
        names = [*self.own, *entry_points(group=self.group).names]
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        where = f"{self.field}: " if self.field else ""
        words = f"there are {', '.join(names)}, and my.module:function"
        raise UsageError(f"{where}no {self.kind} {name!r}; {hint}{words}")
