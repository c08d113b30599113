"""What is in use: everywhere, or in a `with` of one thread or task."""

import itertools

from speechbrain_taskarith.adapters.hooks import context

_NAMES = map("route {}".format, itertools.count())


class Chosen:
    """One choice, and what holds again once it turns out to be a `with`'s.

    One that `follows_tasks` is made anew for every batch, from its tasks.
    """

    def __init__(self, value, follows_tasks=False):
        self.value, self.instead = value, None
        self.follows_tasks = follows_tasks


class Route:
    """What is in use, shared by all layers of an encoder.

    A choice is None, an adapter's name, `COMBINED`, or positions [B] (-1:
    the base).
    """

    def __init__(self):
        # Compiled graphs compare it, and could not compare routes.
        self.name = next(_NAMES)
        #: Where no `with` says something else; `Chosen`.
        self.everywhere = Chosen(None)
        #: Of the last pass with gradients, or chosen since, by any thread: for
        #: autograd, which may compute layers anew in a thread of its own, or
        #: after the `with`; and the number of these passes.
        self.latest, self.passes = None, 0
        self.has_warned = False
        #: The next batch's tasks, where a loop says them.
        self.tasks = None
        #: What looks on, a `Watch`, or None.
        self.watch = None
        self._moved = {}

    @property
    def choice(self):
        """Return what is in use here: in this thread or asyncio task."""
        own = self.own()
        if own is not None:
            return own.value
        return self.latest if context.in_backward else self.everywhere.value

    @property
    def follows_tasks(self):
        """Tell whether the batch's tasks choose here, and no `use`."""
        return self.own() is None and self.everywhere.follows_tasks

    def follow(self, positions):
        """Take the positions of the batch's tasks."""
        self.everywhere.value = self.latest = positions

    def remember(self):
        """Keep what a forward pass goes through for its backward pass."""
        if not context.in_backward:
            self.latest = self.choice
            self.passes += 1

    def own(self):
        """Return the `Chosen` of the innermost `with`, None without one."""
        around = context.around
        while around is not None and around[0] != self.name:
            around = around[2]
        return None if around is None else around[1]

    def __getstate__(self):
        # A copy goes through what is in use where it is made.
        everywhere = Chosen(self.choice, self.follows_tasks)
        return {**vars(self), "everywhere": everywhere, "_moved": {}}

    def __setstate__(self, state):
        vars(self).update(state, name=next(_NAMES))

    def positions(self, choice, device):
        """Return positions on a device, moved there once."""
        known, moved = self._moved.get(device, (None, None))
        if choice is not known:
            moved = choice.to(device, non_blocking=True)
            self._moved[device] = (choice, moved)
        return moved


class Use:
    """A choice: from now on, or for a `with` block and what runs in it.

    In a `with`, other threads and asyncio tasks keep their own.
    """

    def __init__(self, route, choice):
        self._route, self._chosen, self._token = route, Chosen(choice), None
        self._own = route.own()
        self._latest, self._passes = route.latest, route.passes
        if self._own is not None:
            self._before, self._own.value = self._own.value, choice
        else:
            self._before, route.everywhere = route.everywhere, self._chosen
        route.latest = choice

    def __enter__(self):
        route, chosen = self._route, self._chosen
        if self._own is not None:
            self._own.value = self._before
        else:
            # Another thread may be between its `use` and its `with`, too.
            while self._before.instead is not None:
                self._before = self._before.instead
            chosen.instead = self._before
            if route.everywhere is chosen:
                route.everywhere = self._before
        entry = (route.name, chosen, context.around)
        self._token = context.AROUND.set(entry)
        return self

    def __exit__(self, *error):
        context.AROUND.reset(self._token)
        if self._route.passes == self._passes:
            self._route.latest = self._latest
