"""`@audited`: every call of a function becomes one audited operation."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Iterable, Mapping
from types import CoroutineType, MethodType
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from opentelemetry.trace import TracerProvider

from astrocyte_otel_audit.emit.operation import AuditOperation
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.normalize import Normalizer

P = ParamSpec("P")
R = TypeVar("R")

Arguments: TypeAlias = Mapping[str, Any]
#: Which arguments are the request: all, none, those named, or whatever a function makes of them.
Request: TypeAlias = bool | Collection[str] | Callable[[Arguments], object]
#: Which part of the result is the response: all, nothing, or whatever a function makes of it.
Response: TypeAlias = bool | Callable[[Any], object]
_Begin: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], AuditOperation]


def audited(
    action: str,
    *,
    bank_id: str | Callable[[Arguments], str | None] | None = None,
    transport: str | None = None,
    request: Request = True,
    response: Response = True,
    required: bool = False,
    normalizer: Normalizer | None = None,
    tracer_provider: TracerProvider | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Audit every call of a function or method: sync, async, generator or async generator.

    The function keeps its signature, its result and its exceptions. A generator's operation covers the
    iteration, from the first item asked for to the last, an early ``close()`` included. Where a plain function
    returns a coroutine, the operation ends when that has been awaited (``unknown`` if it never is); any other
    awaitable is a result like any other. On a class or static method, either order of the decorators works.

    Args:
        action: what the call does: ``retain``, ``recall``, ``classify``, …
        bank_id: the bank, or a function from the arguments by name to it. By default the argument called
            ``bank_id`` if the function has one, else the scope's.
        transport: how the call comes in; the scope's by default.
        request: True (the default) for all arguments but ``self`` and ``cls``; their names for some; False for
            none; or a function from the arguments by name to a payload. Always normalized.
        response: True (the default) for the result; False for nothing; or a function from the result to a
            payload. Always normalized. A generator's is ``{"item_count": n}``, with ``closed_early`` where the
            consumer left before its end; a function gets the number of items.
        required: run the body only if an audit pipeline has taken the operation, whatever the allowlist says.
        normalizer: in place of the one given to `configure_audit`.
        tracer_provider: in place of the global one.

    Raises:
        ConfigurationError: at decoration, for an argument that can't be used.
        AuditUnavailableError: at the call, with ``required=True`` and no pipeline to take it.
    """
    if not isinstance(action, str) or not action.strip():
        raise ConfigurationError("action", "accepted is the name of what the function does, as in @audited('retain')")
    for name, choice in (("request", request), ("response", response)):
        named = name == "request" and isinstance(choice, Collection) and not isinstance(choice, (str, bytes))
        if not (isinstance(choice, bool) or callable(choice) or named):
            raise ConfigurationError(
                name, f"got a {type(choice).__name__}; accepted is True, False or a function"
                + (", or a list of argument names" if name == "request" else "")
            )  # fmt: skip
    if bank_id is not None and not isinstance(bank_id, str) and not callable(bank_id):
        raise ConfigurationError("bank_id", "accepted is a bank's id, or a function from the arguments to it")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, (classmethod, staticmethod)):
            return cast("Callable[P, R]", type(function)(decorate(function.__func__)))
        if not callable(function) or inspect.isclass(function):
            raise ConfigurationError(
                "function", "accepted is a function or a method; decorate a class's methods one by one"
            )
        bind = _binder(function)

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AuditOperation:
            arguments = bind(args, kwargs)
            bank = _bank(bank_id, arguments)
            if bank_id is None and request is True:
                arguments.pop("bank_id", None)  # it has a column of its own, and needn't be in the request too
            return AuditOperation(
                action,
                bank_id=bank,
                transport=transport,
                request=_choose(request, arguments),
                required=required,
                normalizer=normalizer,
                tracer_provider=tracer_provider,
            )

        return cast("Callable[P, R]", _wrap(function, begin, response))

    return decorate


def _wrap(function: Callable[..., Any], begin: _Begin, response: Response) -> Callable[..., Any]:
    # An object that is called like a function is what its __call__ is.
    bodies = (function, getattr(function, "__call__", None))  # noqa: B004 - which is asked for its kind
    if any(map(inspect.isasyncgenfunction, bodies)):
        return functools.update_wrapper(_GeneratorFunction(_iterate_async, begin, response), function)
    if any(map(inspect.isgeneratorfunction, bodies)):
        return functools.update_wrapper(_GeneratorFunction(_iterate, begin, response), function)
    if any(map(inspect.iscoroutinefunction, bodies)):
        return _wrap_coroutine(function, begin, response)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as operation:
            result = function(*args, **kwargs)
            if type(result) is CoroutineType:  # it has done nothing yet; what else can be awaited may be under way
                operation.keep_open()
                return _finish_when_awaited(operation, result, response)
            operation.response = _choose(response, result)
            return result

    return wrapper


def _finish_when_awaited(
    operation: AuditOperation, body: CoroutineType[Any, Any, Any], response: Response
) -> CoroutineType[Any, Any, Any]:
    async def go_on() -> Any:
        error = None
        try:
            with operation.current():
                result = await body
            operation.response = _choose(response, result)
            return result
        except BaseException as raised:
            error = raised
            raise
        finally:
            never_awaited.detach()
            operation.finish(error)

    awaited = cast("CoroutineType[Any, Any, Any]", go_on())
    awaited.__name__, awaited.__qualname__ = body.__name__, body.__qualname__  # Python warns of it by name
    never_awaited = weakref.finalize(awaited, _finish_unknown, operation, body)
    return awaited


def _finish_unknown(operation: AuditOperation, body: CoroutineType[Any, Any, Any]) -> None:
    body.close()  # or Python would warn of it too
    operation.outcome = "unknown"
    operation.finish()


def _wrap_coroutine(function: Callable[..., Any], begin: _Begin, response: Response) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as operation:
            result = await function(*args, **kwargs)
            operation.response = _choose(response, result)
            return result

    return wrapper


class _GeneratorFunction(functools.partial[Any]):
    """A decorated generator function, of `_iterate` or `_iterate_async`.

    It makes the undecorated generator when it is called, so that a wrong call raises there, and not at the first
    item. A function that did so would be no generator function to `inspect`; a partial of one is.
    """

    __qualname__: str
    __wrapped__: Callable[..., Any]

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(self.__wrapped__(*args, **kwargs), args, kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any]:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> str:
        return self.__qualname__  # copied and pickled as a function is: by its name


def _iterate(
    begin: _Begin, response: Response, body: Generator[Any, Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    # The span is current only while the body runs: a generator shares its caller's context, and would leak it.
    operation = begin(args, kwargs)
    count, closed_early, error = 0, False, None
    operation.start()
    try:
        advance: Callable[[Any], Any] = body.send
        value: Any = None
        while True:
            with operation.current():
                item = advance(value)
            count += 1
            try:
                value = yield item
                advance, closed_early = body.send, False
            except BaseException as thrown:  # the consumer's throw() or close(): the body may handle it
                advance, value, closed_early = body.throw, thrown, isinstance(thrown, GeneratorExit)
    except StopIteration as stop:
        return stop.value
    except BaseException as raised:
        error = None if closed_early and isinstance(raised, GeneratorExit) else raised
        raise
    finally:
        operation.response = _count(response, count, closed_early)
        operation.finish(error)


async def _iterate_async(
    begin: _Begin, response: Response, body: AsyncGenerator[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, Any]:
    # The twin of _iterate: the two protocols differ in every call, so they share no code.
    operation = begin(args, kwargs)
    count, closed_early, error = 0, False, None
    operation.start()
    try:
        advance: Callable[[Any], Any] = body.asend
        value: Any = None
        while True:
            with operation.current():
                item = await advance(value)
            count += 1
            try:
                advance, value = body.asend, (yield item)
            except GeneratorExit:
                # Not by athrow(): an event loop that ends closes the inner generator too, in any order, and
                # athrow() on a closed one gives None as if it were an item (CPython 3.11).
                closed_early = True
                with operation.current():
                    await body.aclose()
                raise
            except BaseException as thrown:  # the consumer's athrow(): the body may handle it
                advance, value = body.athrow, thrown
    except StopAsyncIteration:
        return
    except BaseException as raised:
        error = None if closed_early and isinstance(raised, GeneratorExit) else raised
        raise
    finally:
        operation.response = _count(response, count, closed_early)
        operation.finish(error)


def _binder(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Return a function that names the arguments of a call. `inspect.Signature.bind` would cost ten times as much.

    A call that doesn't fit the signature is named as far as it goes; the function itself raises on it.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables in C have no signature
        parameters = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.default is not None}
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    skipped = 1 if positional and positional[0] in ("self", "cls") else 0
    names = positional[skipped:]

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = {**defaults, **dict(zip(names, args[skipped:] if skipped else args, strict=False)), **kwargs}
        if rest is not None and len(args) > len(positional):
            arguments[rest] = args[len(positional) :]
        return arguments

    return bind


def _bank(bank_id: str | Callable[[Arguments], str | None] | None, arguments: dict[str, Any]) -> str | None:
    if bank_id is None:
        return cast("str | None", arguments.get("bank_id"))
    if isinstance(bank_id, str):
        return bank_id
    chosen = _choose(bank_id, arguments)
    return None if isinstance(chosen, _Unusable) else cast("str | None", chosen)


def _choose(choice: Request | Response, value: Any) -> object:
    """Return the part of the arguments or of the result that is audited; never raises."""
    if choice is True:
        return cast("object", value)
    if choice is False:
        return None
    if callable(choice):
        try:
            return choice(value)
        except Exception as fault:  # the user's function: what it made of it is unknown, the call goes on
            return _Unusable(error=type(fault).__qualname__)
    return {name: value[name] for name in cast("Iterable[str]", choice) if name in value}


def _count(response: Response, count: int, closed_early: bool) -> object:
    if response is not True:
        return _choose(response, count)
    return {"item_count": count, "closed_early": True} if closed_early else {"item_count": count}


class _Unusable(dict[str, str]):
    """Stands in a payload for a `request` or `response` function that raised: its error's class."""
