"""What is learnt of tenants, for as many as may be remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

T = TypeVar("T")
Tenant = tuple[str, str]
"""A model, and a tenant of it."""
_MOST_TENANTS = 1024


class ByTenant(Generic[T]):
    """Something of each tenant; of those that were seen longest ago it is forgotten."""

    def __init__(self) -> None:
        self._found: OrderedDict[Tenant, T] = OrderedDict()

    def of(self, tenant: Tenant, new: Callable[[], T]) -> T:
        """A tenant's, made where there is none."""
        found = self._found.pop(tenant) if tenant in self._found else new()
        self._found[tenant] = found
        while len(self._found) > _MOST_TENANTS:
            self._found.popitem(last=False)
        return found

    def keep(self, models: Collection[str]) -> None:
        """Forget the tenants of any other model."""
        for tenant in [tenant for tenant in self._found if tenant[0] not in models]:
            del self._found[tenant]
