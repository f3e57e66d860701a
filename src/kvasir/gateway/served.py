"""What a client may ask for as `model`: the deployment's models, and adapters by their own names.

Knows names, folders and limits. Must not know requests, or which worker holds what: a worker reads
an adapter when the first prompt that needs it comes, and forgets it when it needs the room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvasir.core.errors import Forbidden, NotFound, nearest
from kvasir.core.request import Adapter
from kvasir.core.specs import ModelSpec
from kvasir.engine.peft import CONFIG, WEIGHTS, adapter_of
from kvasir.gateway.schema import BadField, LoadBody

NAME_CHARS_MAX = 128
PATH_CHARS_MAX = 1024


class Entry(NamedTuple):
    """A name's meaning: `model` under `adapter`, or as it is."""

    model: ModelSpec
    adapter: Adapter | None = None


class Served:
    """Names to what they mean, in the order in which they came. One event loop's."""

    def __init__(self, models: Sequence[ModelSpec]) -> None:
        """Reads the folders of the adapters that the models name. Raises ModelError."""
        self.entries = {model.name: Entry(model) for model in models}
        self._bases = tuple(models)
        self._loading = asyncio.Lock()
        for model in models:
            for name, path in model.adapters.items():
                self.entries[name] = Entry(model, adapter_of(name, path, model.path))

    def find(self, name: str) -> Entry:
        """Raises NotFound with the nearest name."""
        found = self.entries.get(name)
        if found is None:
            raise NotFound(f"no model {name!r} here", nearest=nearest(name, self.entries))
        return found

    async def load(self, body: LoadBody) -> None:
        """Serve one more adapter, or another one under a known name (`load_inplace`). Its files are
        read on a thread.

        Raises Forbidden: the deployment does not allow it; BadField: a name, folder or number
        that it does not allow; ModelError: no adapter of that model.
        """
        model = self._base(body.base_model_name)
        folder = inside(model.adapters_folder or "", body.lora_path)
        async with self._loading:
            self._check_name(model, body)
            adapter = await asyncio.to_thread(adapter_of, body.lora_name, folder, model.path)
            self.entries[body.lora_name] = Entry(model, adapter)

    def unload(self, name: str) -> None:
        """Requests that run under it go on. Raises Forbidden, NotFound."""
        allowing = self._allowing()
        known = [n for n, e in self.entries.items() if e.adapter and e.model in allowing]
        if name not in known:
            raise NotFound(f"no adapter {name!r} is loaded", nearest=nearest(name, known))
        del self.entries[name]

    def _check_name(self, model: ModelSpec, body: LoadBody) -> None:
        name, old = body.lora_name, self.entries.get(body.lora_name)
        if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
            raise BadField(f"lora_name must be 1 to {NAME_CHARS_MAX} characters", "lora_name")
        if old is not None and (old.adapter is None or old.model is not model):
            raise BadField(f"{name!r} is the name of another model", "lora_name")
        if old is not None and not body.load_inplace:
            step = '"load_inplace": true, or unload it first'
            raise BadField(f"{name!r} is loaded already", "lora_name", next_step=step)
        count = sum(e.adapter is not None and e.model is model for e in self.entries.values())
        if old is None and count >= model.adapters_max:
            what = f"{model.name} has {count} adapters, which is the limit"
            step = "unload one, or raise adapters_max of the model"
            raise BadField(what, "lora_name", next_step=step)

    def _allowing(self) -> list[ModelSpec]:
        """Models whose adapters a client may change."""
        found = [model for model in self._bases if model.allow_runtime_adapters]
        if not found:
            raise Forbidden(
                "adapters may not be changed while it serves",
                next_step="allow_runtime_adapters: true, and adapters_folder, at a model",
            )
        return found

    def _base(self, name: str | None) -> ModelSpec:
        """The model that is named, or the only one."""
        allowing = {model.name: model for model in self._allowing()}
        if name is None and len(allowing) > 1:
            step = f"one of {', '.join(allowing)}"
            raise BadField("base_model_name is required here", "base_model_name", next_step=step)
        found = allowing.get(name or next(iter(allowing)))
        if found is None:
            what = f"no model {name!r} here takes adapters"
            raise NotFound(what, nearest=nearest(name or "", allowing))
        return found


def inside(root: str, path: str) -> Path:
    """The folder `path`, from `root`, with nothing of it outside of `root`. Raises BadField."""
    if len(path) > PATH_CHARS_MAX:
        raise BadField(f"lora_path is over {PATH_CHARS_MAX} characters", "lora_path")
    outside = BadField(
        "lora_path is not inside the folder for adapters", "lora_path",
        next_step="a folder in there; the deployment names it (adapters_folder)",
    )  # fmt: skip
    try:
        home = Path(root).resolve()
        folder = (home / path).resolve()
        every = (folder, *((folder / name).resolve() for name in (CONFIG, WEIGHTS)))
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        raise outside from None
    if not all(one.is_relative_to(home) for one in every):
        raise outside
    return folder
