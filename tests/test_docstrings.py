"""Every public function says what it does, and one with several parameters says what each is."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import parafit

PACKAGE = Path(parafit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Public:
    """A public function or method where it is defined.

    Attributes:
        name: of the function, with its class before it.
        node: its definition.
        owner: its class, None for a function of a module.
    """

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None = None


def published(tree):
    """The public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node):
            yield Public(node.name, node)
        elif isinstance(node, ast.ClassDef) and is_public(node):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(member):
                    yield Public(f"{node.name}.{member.name}", member, node)


def is_public(node):
    return not node.name.startswith("_")


@cache
def classes():
    """Every class of the package by its name; no two that are inherited from share one."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def bases(owner):
    """The classes of parafit that a class inherits from, however far."""
    for base in owner.bases if owner else ():
        base = base.value if isinstance(base, ast.Subscript) else base
        for parent in classes().get(base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", ""), ()):
            yield parent
            yield from bases(parent)


def inherits(public):
    """Whether the method stands in for one that a class of parafit documents."""
    members = (member for parent in bases(public.owner) for member in parent.body)
    return any(getattr(member, "name", "") == public.node.name and ast.get_docstring(member) for member in members)


def parameters(public):
    """The names that a caller of a function has to know."""
    arguments = public.node.args
    decorators = {getattr(each, "id", getattr(each, "attr", "")) for each in public.node.decorator_list}
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if public.owner is not None and "staticmethod" not in decorators:
        positional = positional[1:]
    starred = [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [name for name in (*positional, *starred, *(argument.arg for argument in arguments.kwonlyargs)) if not name.startswith("_")]


def explained(docstring):
    """The names that sections `Args:` of a docstring explain, its own or that of a function of which it says to have the same."""
    text = docstring + "\n"
    names = set()
    for section in re.findall(r"^Args:\n((?: {4,}.*\n|\n)+)", text, flags=re.MULTILINE):
        for head in re.findall(r"^ {4}([*\w][*\w, ]*):", section, flags=re.MULTILINE):
            names |= {name.strip().lstrip("*") for name in head.split(",")}
    for other in re.findall(r"^Args(?: and errors)? are those of `(?:[\w.]+\.)?(\w+)`", text, flags=re.MULTILINE):
        names |= set().union(*(explained(words) for words in documented().get(other, ())))
    return names


@cache
def documented():
    """The docstrings of all functions of the package by their names."""
    found = {}
    for path in FILES:
        for public in published(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(public.node.name, []).append(ast.get_docstring(public.node) or "")
    return found


def is_command(public):
    """Whether a function is a verb of the command line: its docstring is its help, and its options explain themselves."""
    return any("command" in ast.unparse(decorator) for decorator in public.node.decorator_list)


def faults(source):
    """What is missing in a module's docstrings, a line each. A module's own `Args:` are those that all its functions share."""
    tree = ast.parse(source)
    shared = explained(ast.get_docstring(tree) or "")
    for public in published(tree):
        docstring = ast.get_docstring(public.node) or ""
        missing = [name for name in parameters(public) if name not in explained(docstring) | shared]
        if inherits(public):
            continue
        if not docstring:
            yield f"{public.node.lineno}: {public.name} has no docstring"
        elif missing and len(parameters(public)) > 1 and not is_command(public):
            yield f"{public.node.lineno}: {public.name} does not explain {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_explained(path):
    missing = list(faults(path.read_text(encoding="utf-8")))
    assert not missing


FAULTY = '''
def silent(x): ...

def short(x, y):
    """Says nothing of its parameters."""

def partly(x, y):
    """Says something of one.

    Args:
        x: an array of shape (rows, width); y: is not named here.
    """

def fully(x, y, *, z):
    """Explains all.

    Args:
        x, y: arrays of shape (rows, width).
        z: a number.
    """

class Base:
    def method(self, x, y):
        """Explains nothing."""

class Derived(Base):
    def method(self, x, y): ...

    def own(self): ...

    def _hidden(self): ...
'''


def test_the_check_finds_what_is_missing():
    found = [line.split(": ", 1)[1] for line in faults(FAULTY)]
    assert found == [
        "silent has no docstring",
        "short does not explain x, y",
        "partly does not explain y",
        "Base.method does not explain x, y",
        "Derived.method has no docstring",
        "Derived.own has no docstring",
    ]


def test_methods_inherit_the_docstring_that_they_override():
    source = (PACKAGE / "backends" / "cpu" / "backend.py").read_text(encoding="utf-8")
    assert any(inherits(public) for public in published(ast.parse(source)))
