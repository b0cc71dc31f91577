"""An in-process fleet whose agents have a Flower app, each in a real process."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.clientapp.flower_apps import FlowerApps
from agent.clientapp.interfaces import PeerIdentity
from agent.clientapp.owner_rules import OwnerRules
from agent.home.settings_schema import AgentSettings
from agent.trainer.app_trainer import AppTrainer
from coordinator.runs.state import Run
from coordinator.storage import installed_apps
from coordinator.storage.run_events import RunSpec
from protocols.enrollment import identity
from protocols.local import flower_apps
from protocols.local.flower_apps import AppCard
from tests.support import flower_apps as apps
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data


@dataclasses.dataclass
class AppAgent:
    """What an agent has for apps. `owner` may be changed."""

    agent: Agent
    owner: AgentSettings
    process: AppTrainer


class AppFleet:
    """A fleet with the app in `source`, installed at the coordinator and at each agent.

    `given`: what it is installed with; `config(part)`: what it finds as its node's config.
    """

    def __init__(
        self,
        fleet: Fleet,
        folder: Path,
        source: Path,
        config: Callable[[int], dict[str, Any]] = lambda part: {},
        **given: Any,
    ) -> None:
        self.fleet, self._folder = fleet, folder
        self._source, self._config, self._given = source, config, given
        self.card: AppCard
        self.card, installed = flower_apps.install(source, **given)
        installed_apps.put(fleet.home, self.card.name, installed)
        self.agents = [self._give(agent, part) for part, agent in enumerate(fleet.agents)]

    def _give(self, agent: Agent, part: int) -> AppAgent:
        config: dict[str, Any] = {"partition-id": part, "num-partitions": len(self.fleet.agents)}
        config |= self._config(part)
        _, installed = flower_apps.install(self._source, config=config, **self._given)
        home = self._folder / agent.machine.name
        owner = AgentSettings(apps={self.card.name: installed}, threads=1)
        made = AppAgent(agent, owner, None)  # type: ignore[arg-type]
        made.process = AppTrainer(
            home / "apps", lambda: made.owner, read=(home / "cache",), on_progress=lambda _: None
        )
        public = identity.public_bytes(self.fleet.keys.sign_key)
        me = PeerIdentity(agent.peer, agent.machine.sign_key.sign, public, agent.machine.fleet)
        answers = FlowerApps(
            me,
            home / "app-answers",
            made.process,
            OwnerRules(lambda: made.owner),
            fetch=agent.versions.fetch,
            send=agent.send,
        )
        assert agent.client is not None
        agent.client._queries = agent.client._queries._replace(app=answers.answer)
        return made

    def start(self, settings: dict[str, Any] | None = None, **spec: Any) -> str:
        """Start a run of the app."""
        made = {"task": self.card.task, "app": self.card.code, "rounds": 2, "deadline_s": 60.0}
        made |= {"settings": settings or {}, "quorum": len(self.agents)}
        return self.fleet.hub.runs.start(RunSpec(**made | spec), "")

    async def finished(self, run_id: str, within_s: float = 150) -> Run:
        return await self.fleet.finished(run_id, within_s=within_s)

    def files(self, run_id: str) -> Path:
        """The folder in which the ServerApp worked."""
        return self.fleet.home / "apps" / run_id

    def log(self, run_id: str) -> str:
        """What the ServerApp has printed."""
        return (self.files(run_id) / "server.log").read_text()


@asynccontextmanager
async def app_fleet(
    folder: Path, app: str | Path, agents: int = 2, **given: Any
) -> AsyncIterator[AppFleet]:
    """A fleet of agents that have an app: that of the tests with this name, or in this folder."""
    data = [some_data(4, number) for number in range(agents)]
    source = app if isinstance(app, Path) else apps.FOLDER / app
    async with fleet_of(folder, *data) as fleet:
        made = AppFleet(fleet, folder, source, **given)
        try:
            yield made
        finally:
            for one in made.agents:
                one.process.close()
