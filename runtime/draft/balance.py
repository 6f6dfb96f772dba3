"""What speculation has won so far, less what it has cost: tries of it are paid out of that."""

from __future__ import annotations

from collections.abc import Collection

from blockzoo.runtime.draft.tenants import ByTenant, Tenant

_FIRST = 4.0  # steps, before anything was won
_MOST = 16.0  # that are kept: what was won long ago pays for nothing now
_MOST_OWED = 6.0
_MOST_LOST = 6.0  # by one step; more was the machine's doing
_EARNED = 0.01  # by every step: so much of the time may be lost
_TRUST, _HOPED = 0.5, 4.0  # in what is hoped for, at first, as if so many tokens had been
_REMEMBERED = 0.95  # of them, from step to step
_BY_REQUEST = 0.5  # the same by requests, shared by those that run together


class Balance:
    """Of one tenant; its unit is a step without drafts."""

    def __init__(self) -> None:
        self._steps = _FIRST
        self._hoped, self._came = _HOPED, _TRUST * _HOPED

    @property
    def steps(self) -> float:
        """What is left; negative: what is owed."""
        return self._steps

    def welcome(self, share: float) -> None:
        """Requests came, so large a share of the tenant's that run: what they are like is not known, and
        what others won does not pay for them."""
        more = max(self._steps - _FIRST, 0.0)
        self._steps = min(self._steps - share * more + _BY_REQUEST * share, _MOST)

    @property
    def trust(self) -> float:
        """The share of what was hoped for that came, 1 at most."""
        return min(self._came / self._hoped, 1.0)

    def hear(self, hoped: float, came: float) -> None:
        """Of a step's guesses so many were hoped to come true, and so many did."""
        self._hoped = _REMEMBERED * self._hoped + hoped
        self._came = _REMEMBERED * self._came + came

    def observe(self, won: float) -> None:
        """A step ran that was worth so many more than it took, or fewer."""
        self._steps = min(max(self._steps + max(won, -_MOST_LOST) + _EARNED, -_MOST_OWED), _MOST)


class Balances:
    """Of the tenants of one executor. What one may win is bounded, so that few who win much do not slow down
    all others for long; most of them must win."""

    def __init__(self) -> None:
        self._tenants: ByTenant[Balance] = ByTenant()

    def of(self, tenant: Tenant) -> Balance:
        """A tenant's."""
        return self._tenants.of(tenant, Balance)

    def keep(self, models: Collection[str]) -> None:
        """Forget the tenants of any other model."""
        self._tenants.keep(models)

    def at_stake(self, tenants: Collection[Tenant]) -> float:
        """What the next step of some tenants may cost, should it win nothing: the mean of theirs."""
        return sum(self.of(tenant).steps for tenant in tenants) / len(tenants)

    def trust(self, tenants: Collection[Tenant]) -> float:
        """The share of what is hoped for that is to be counted on: the mean of theirs."""
        return sum(self.of(tenant).trust for tenant in tenants) / len(tenants)
