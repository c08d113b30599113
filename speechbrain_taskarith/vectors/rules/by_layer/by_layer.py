"""Another rule for each group of layers."""

from speechbrain_taskarith.utils.patterns import matches, require_match
from speechbrain_taskarith.vectors.rules.base import Rule, check_rule


class ByLayer(Rule):
    """A rule for each group of parameters, chosen by name.

    Each rule sees the parameters of its group as if they were the whole
    model: TIES trims within the group, and the group has its rule's own
    scale. This is what merging tools call parameters with filters (Goddard
    et al. 2024, arXiv 2403.13257). Reference:
    `reference.by_layer`.

    Arguments
    ---------
    rules : dict
        `{pattern: rule}`: shell patterns of parameter names; the first that
        matches wins. A pattern that matches nothing is an error.
    default : Rule or None
        For parameters that match no pattern. None: they stay the base's.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import TIES, TaskArithmetic
    >>> rule = ByLayer({"enc.*": TIES(density=0.5)}, TaskArithmetic(0.1))
    >>> base = {"enc.w": torch.zeros(2), "out.w": torch.zeros(2)}
    >>> rule(base, [{n: torch.tensor([1.0, 2.0]) for n in base}])
    {'enc.w': tensor([0., 2.]), 'out.w': tensor([0.1000, 0.2000])}
    """

    def __init__(self, rules, default=None):
        if not hasattr(rules, "items") or not rules:
            raise ValueError(
                f"rules={rules!r}: expected {{pattern: rule}}, e.g. "
                "{'encoder.*': TIES()}"
            )
        self.rules = {
            str(pattern): check_rule(rule, f"rules[{pattern!r}]")
            for pattern, rule in rules.items()
        }
        self.default = default
        # `None` is the group of what matches no pattern.
        self._groups = dict(self.rules)
        if default is not None:
            self._groups[None] = check_rule(default, "default")
        every = self._groups.values()
        self.min_vectors = max(rule.min_vectors for rule in every)
        most = [rule.max_vectors for rule in every if rule.max_vectors]
        self.max_vectors = min(most, default=None)
        self.whole_tensors = any(rule.whole_tensors for rule in every)

    def check_number(self, number):
        """See `Rule.check_number`: also what each rule checks."""
        super().check_number(number)
        for rule in self._groups.values():
            rule.check_number(number)

    def _pattern(self, name):
        return next((p for p in self.rules if matches(name, p)), None)

    def group(self, name):
        """See `Rule.group`."""
        pattern = self._pattern(name)
        rule = self._groups.get(pattern)
        return pattern, rule and rule.group(name)

    def _names(self, names):
        """Return `{pattern: names}` of all groups that have a rule."""
        names = list(names)
        found = {pattern: [] for pattern in self._groups}
        for name in names:
            pattern = self._pattern(name)
            if pattern in found:
                found[pattern].append(name)
        return {pattern: group for pattern, group in found.items() if group}

    def granularity(self, shape):
        """See `Rule.granularity`: what all rules and their stages can do."""
        every = self._groups.values()
        parts = [part for rule in every for part in (rule, *rule.stages)]
        return max(part.granularity(shape) for part in parts)

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`."""
        every = self._groups.values()
        return max(rule.bytes_per_element(number) for rule in every)

    def scales(self, names):
        """See `Rule.scales`: each rule's in its group, 0 where there is none.

        ValueError for a pattern that matches nothing.
        """
        names = list(names)
        for pattern in self.rules:
            require_match(names, pattern)
        scales = dict.fromkeys(names, 0.0)
        for pattern, group in self._names(names).items():
            scales.update(self._groups[pattern].scales(group))
        return scales

    def prepare(self, stream):
        """See `Rule.prepare`: each rule's, with a stream of its group."""
        prepared = {}
        for pattern, names in self._names(stream.source.shapes).items():
            rule = self._groups[pattern]
            part = stream.part(names, rule.stages)
            prepared[pattern] = rule, part, rule.prepare(part)
        return prepared

    def merge(self, vectors, place, work, prepared):
        """See `Rule.merge`."""
        group = prepared.get(self._pattern(place.name))
        if group is None:
            # Taken, so that NaN is found; the scale is 0.
            for _ in vectors:
                pass
            return work.zeros("none", place.size)
        rule, part, ready = group
        return rule.merge(part.vectors(place, work), place, work, ready)
