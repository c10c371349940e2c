"""What keeps states beyond their slots: the prefix cache, the states that clients save, their files and transfers."""

from dataclasses import dataclass

from server.component_settings import EngineConfig
from server.engine.identity import model_fingerprint
from server.engine.memory import BuiltRunner
from server.engine.named_states import NamedStates
from server.engine.reuse import PrefixReuse, build_reuse, state_limits
from server.engine.saved_files import SavedFiles
from server.engine.state_transfer import StateTransfer
from server.engine.stats import Figures
from server.kernels import STATE_DTYPES
from server.types import SavedStats


@dataclass(frozen=True, slots=True)
class StateKeeping:
    """The parts; all are None where no tier can hold a state.

    Attributes:
        reuse: lets prompts begin from what has been absorbed.
        states: those that clients have saved.
        transfer: sends them and receives them.
        files: None also where they are kept in memory only.
    """

    reuse: PrefixReuse | None = None
    states: NamedStates | None = None
    transfer: StateTransfer | None = None
    files: SavedFiles | None = None

    def stats(self) -> SavedStats:
        """The figures of saved states as they stand."""
        if self.states is None or self.reuse is None:
            return SavedStats()
        return self.states.stats(self.reuse.held())

    def close(self) -> None:
        """Remove what is kept on disk for the engine itself."""
        for part in (self.transfer, self.files, self.reuse):
            if part is not None:
                part.close()


def build_keeping(config: EngineConfig, vocab_size: int, built: BuiltRunner, figures: Figures) -> StateKeeping:
    """The parts as the settings want them.

    Args:
        config: the settings.
        vocab_size: of the model.
        built: the runner, and what is left of memory.
        figures: where the time that files take is counted.

    Raises:
        SettingsError: the folder for files cannot be used.
    """
    runner, settings = built.runner, config.state_cache
    if not any(built.cache_bytes.values()):
        return StateKeeping()
    reuse = build_reuse(settings, built.cache_bytes, runner.parked_bytes, runner.pool_layout, built.device, figures)
    if reuse is None:
        return StateKeeping()
    model = model_fingerprint(config.model_folder, config.load_format, config.seed)
    files = None
    if settings.folder is not None:
        files = SavedFiles(settings.folder, reuse.store, model, vocab_size)
    states = NamedStates(reuse, state_limits(settings, built.cache_bytes, runner.parked_bytes), files)
    transfer = StateTransfer(
        states,
        reuse,
        model,
        vocab_size,
        runner.pool_layout,
        STATE_DTYPES.get(settings.dtype),
        settings.signing_key,
        config.max_model_len,
    )
    return StateKeeping(reuse, states, transfer, files)
