"""Train one Jet by exact likelihood, and measure its bits per dimension.

    python train.py --data cifar10-subset --run-dir runs/first --model.num_couplings 8 \\
        --model.block_depth 1 --model.emb_dim 32 --model.num_heads 2 --batch_size 16 \\
        --total_steps 100 --lr 4e-3

The same command goes on where a stopped run was, and ends with the same bits. Defaults are the
official recipe (google-research/big_vision, configs/proj/jet/imagenet64.py), which reports 3.72
bits/dim.
"""
import contextlib
import functools
import platform
from pathlib import Path

import harness  # noqa: F401 (first: it says what is not installed)

import torch

import kernels
from convert import load_jet, opened, weights_id
from data import (image_shape, load_images, pinned, training_batch, training_batches,
                  told, training_labels)
from evaluate import evaluate
from formats.hub import fetched
from harness import distributed, run_folder
from harness.advice import advice
from harness.checkpoint import CHECKPOINT_FORMAT, load_weights, read_weights, weights_checksum
from harness.condition import check_labels, one_hot
from harness.errors import CheckpointError, TrainingError, UserError, one_line
from harness.flags import ArgumentParser, add_setting_flags, model_fields, one_line_errors
from harness.host import ROOT, code_version
from harness.machine import (compile_couplings, compile_limits, free_bytes, full_float32, hardware,
                             outside_errors, pick_device, versions, where)
from harness.memory import fit_memory, refuse_too_large, watch_memory
from harness.pace import Pace
from harness.place import Place, add_place_flags, place_from_flags, step_mode
from harness.progress import progress
from harness.signals import Signals, Stopped
from jet import Jet, JetConfig
from recipe import (DTYPES, TrainConfig, add_gradients, extension, learning_rate, make_optimizer,
                    make_step, read_steps)

TRAIN_ROW_IMAGES = 2048  # the first training images, evaluated beside the test images: overfitting


def weights_config(path):
    """(TrainConfig, step) of the run whose weights a path holds; (None, None) if it is foreign."""
    path, content = opened(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        return None, None
    try:
        return TrainConfig.from_dict(content["config"]), int(content["step"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its configuration is damaged or of another version "
                              f"({one_line(error)})") from None


def train(config, run_dir, stop_after=None, *, place=Place(), init_from=None, signals=None,
          quiet=False):
    """Train a Jet and evaluate it; the same call again resumes, a finished run returns at once.

    config: TrainConfig. run_dir: gets the files that harness/run_folder.py lists; the last two
    checkpoints are kept. stop_after: stop with a checkpoint once this many steps are done in all.
    place: where and how it runs; with the number of processes (harness/distributed.py) it decides
    rounding, and all else that decides the result is in config. init_from: run folder or weight
    file that holds config.init's weights; needed to begin such a run, not to resume it. signals:
    looked at after each step and each batch of an evaluation. quiet: no bar.
    Returns what done.json holds: config, rows (a dict per evaluation and split), the last test
    row's bits_per_dim, bits_per_dim_se and num_images, seconds, and what ran it. A run that was
    stopped returns {"step": ...}.
    Raises TrainingError (another configuration, a non-finite loss, a full disk; its subclass
    BusyError: another process is at this run), DataError (images) or CheckpointError (no whole
    checkpoint), each in one line.
    """
    with outside_errors(), full_float32(), contextlib.ExitStack() as stack:
        distributed.start(place.process_timeout_s)
        if (done := run_folder.read_finished(run_dir, config)) is not None:
            return done
        session = Session(config, run_dir, place, init_from)
        if session.compiled:
            stack.enter_context(compile_limits())
        run = stack.enter_context(run_folder.opened(run_dir, config, place))
        bar = stack.enter_context(progress(total=config.total_steps, desc=Path(config.data).name,
                                           unit=" steps", disable=quiet or run.log is None))
        if (done := run_folder.read_finished(run_dir, config)) is not None:
            bar.leave = False
            return done  # finished by the process that we have waited for
        session.begin(run, alone=not quiet)
        with contextlib.suppress(Stopped):
            pace = Pace(signals or Signals(), place.checkpoint_every_s)
            session.steps(run, bar, pace, stop_after)
        return session.end(run)


class Session:
    """One attempt at a run: its Jet, optimizer, images, and the state that a checkpoint holds."""

    def __init__(self, config, run_dir, place, init_from):
        self.config, self.place, self.processes = config, place, distributed.size()
        self.init_from = init_from
        self.device = pick_device(place.device, place.graph)
        self.compiled, self.graph, self.mode = step_mode(place, config, self.device)
        if self.processes > config.batch_size:
            raise TrainingError(f"{self.processes} processes for a batch of {config.batch_size} "
                                "images: at most one for each")
        torch.set_num_threads(place.threads)
        self.images = {split: load_images(config.data, split, place.data_root)
                       for split in ("train", "test")}
        for split, images in self.images.items():
            check_labels(images, config.model)
            self.images[split] = told(images, config.condition, config.seed)
        self.peak_memory = watch_memory(self.device)
        jet = first_jet(config, self.images["train"], init_from, Path(run_dir))
        self.jet = jet.to(self.device, DTYPES[config.precision])
        if config.precision == "float32" and not self.compiled:  # else PyTorch's work in training
            kernels.accelerate(self.jet)
        self.kernels = kernels.used_by(self.jet)
        self.optimizer = make_optimizer(self.jet.parameters(), config, self.graph)
        self.state = {"step": 0, "seconds": 0.0, "rows": [], "micro_batch": None,
                      "processes": self.processes,
                      "train_fingerprint": self.images["train"].fingerprint}
        self.first_step_seconds = None
        self.code_version = code_version()  # now: it may change until the end

    def begin(self, run, alone):
        """Go on from the newest checkpoint, or begin; make it fit in memory."""
        config, place = self.config, self.place
        self.state |= distributed.from_first(self._restore, run)
        first = self.state["step"]
        if self.state["processes"] != self.processes:
            self.state |= {"processes": self.processes, "micro_batch": None}
        sharers = distributed.local_size() if self.device.type == "cpu" else 1
        free = -distributed.agree(-free_bytes(self.device) / sharers)[0]
        self.state["micro_batch"], line = fit_memory(
            self.jet, self.optimizer, config, place.checkpoint_activations,
            place.micro_batch or self.state["micro_batch"], free, self.processes)
        self.hosts = distributed.from_all(platform.node())
        if run.log:
            self._log_start(run, line, alone)
        if not first and config.model.actnorm and not config.init:
            x = training_batch(self.images["train"], config.batch_size, config.seed, 0, self.device)
            self.jet.initialize(x.to(DTYPES[config.precision]), *self._context(0, slice(None)))
        if self.compiled:
            compile_couplings(self.jet)
        self.model = distributed.wrap(self.jet)
        distributed.copy_moments(self.optimizer)

    def _log_start(self, run, line, alone):
        first, place, log = self.state["step"], self.place, run.log
        run.begin_steps(first)
        tell = log.tell if alone else log.write
        version = self.code_version
        tree = {False: "clean", True: "dirty", None: "unknown"}[version["git_dirty"]]
        began = f"started at step {first}:"
        if first > self.config.extends:
            tell(f"resumed at step {first}")
            began = "with"
        elif first:
            tell(f"goes on from the end of the run with the weights {self.config.init}")
        log.write(f"{began} {where(self.processes, place.threads, self.hosts)}, "
                  f"{hardware(self.device)}, torch {torch.__version__}, "
                  f"{self.kernels or 'cuda'} kernels, "
                  f"commit {version['git_commit'] or 'unknown'}, {tree}")
        log.write(f"{line}; {self.mode}")
        for line in advice(self.config, self.device, len(self.images["train"].array)):
            tell(line)

    def _restore(self, run):
        """The state of the newest whole checkpoint, if any; its weights and moments are loaded."""
        later = {"micro_batch", "processes"}  # old checkpoints do not have them
        path, saved = run.restore({"model", "optimizer", *self.state} - later)
        if saved is None:
            return self._extend() if self.config.extends else {}
        saved = {"micro_batch": None, "processes": 1} | saved
        if saved["train_fingerprint"] != self.state["train_fingerprint"]:
            raise TrainingError(f"{path}: the training images have changed since this run began: "
                                "bring them back or use another run folder")
        load_weights(path, self.jet, saved["model"])
        has_moments = self._load_moments(saved["optimizer"], saved["step"])
        if not (has_moments and run_folder.is_state(saved, self.config.total_steps)):
            raise CheckpointError(f"{path}: the optimizer's state or the step does not fit this "
                                  "run: move it away to begin again")
        return {name: saved[name] for name in self.state}

    def _extend(self):
        """The state at the end of the run that this one extends; weights and moments are its."""
        path, content = read_weights(Path(fetched(self.init_from)))
        load_weights(path, self.jet, content["model"])  # in their own precision
        if not self._load_moments(content.get("optimizer"), self.config.extends):
            raise CheckpointError(f"{path}: has no moments of step {self.config.extends}: give the "
                                  "run folder itself, or one that was packed with --moments")
        return {"step": self.config.extends}

    def _load_moments(self, moments, step):
        """Whether Adam's moments fit, and are loaded: the hyper-parameters are the config's."""
        try:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            states = [(self.optimizer.state[parameter], parameter.shape)
                      for parameter in self.jet.parameters() if self.config.total_steps]
            return all(float(state["step"]) == step and state["exp_avg"].shape == shape
                       and state["exp_avg_sq"].shape == shape for state, shape in states)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
            return False

    def steps(self, run, bar, pace, stop_after):
        """The training loop. Raises Stopped when an evaluation was asked to stop."""
        config, state, first = self.config, self.state, self.state["step"]
        last = config.total_steps if stop_after is None else min(stop_after, config.total_steps)
        bar.initial = bar.n = first
        if not config.total_steps:
            self._save(run)  # the weights that are evaluated
        pending, clock = [], pace.clock(state["seconds"])
        if self._evaluation_is_due():  # it was interrupted
            self._evaluate(run, bar, pace, clock)
        is_cut = state["micro_batch"] < config.batch_size / self.processes
        micro_batch = state["micro_batch"] if is_cut else None
        take_step = make_step(self.model, self.optimizer, config, micro_batch, self.graph)
        part = distributed.part(config.batch_size)
        batches = training_batches(self.images["train"], config.batch_size, config.seed,
                                   range(first, last), self.device, part=part)
        with contextlib.closing(batches):
            for step, x in enumerate(batches, first):  # dequantized, (B, C, H, W)
                x = x.to(DTYPES[config.precision])
                # or the first coupling, with no gradient to pass on, is another graph
                x.requires_grad_(self.compiled)
                context = self._context(step, part)
                if step == first and self.processes > 1:
                    # DistributedDataParallel sorts gradients into other buckets after its first
                    # backward, and adds them up in another order: without one to throw away, a
                    # restart would not give the same bits.
                    add_gradients(self.model, x, config, micro_batch, context)
                pending.append((step, *take_step(x, step, *context)))
                bar.update()
                taken = step + 1
                evaluate_now = taken == config.total_steps or (
                    config.eval_every and taken % config.eval_every == 0)
                pace.decide(taken, must_read=step == first, must_save=evaluate_now or taken == last)
                if not pace.read:
                    continue
                rows = read_steps(pending, config)
                now = pace.has_read()
                state |= {"step": taken, "seconds": clock.total(now)}
                rate = (taken - first) * config.batch_size / clock.here(now)
                bar.set_postfix_str(f"{rows[-1][1]:.3f} bits/dim, {rate:.0f} images/s",
                                    refresh=False)
                self._record(run, rows)
                if step == first:
                    self._log_first_step(run, clock.here(now))
                if pace.save:
                    pace.saved(functools.partial(self._save, run), run.log, taken)
                if pace.stop:
                    break
                if evaluate_now:
                    self._evaluate(run, bar, pace, clock)

    def _context(self, step, part):
        """(the condition of a part of a step's batch,), or () of a Jet that takes none."""
        config = self.config
        if config.condition == "none":
            return ()
        labels = training_labels(self.images["train"], config.batch_size, config.seed, step,
                                 config.condition_drop_prob)[part]
        context = pinned(one_hot(labels, config.model.context_dim), self.device)
        return (context.to(self.device, DTYPES[config.precision], non_blocking=True),)

    def _record(self, run, rows):
        config, seconds = self.config, f"{self.state['seconds']:.3f}"
        run.add_steps([(step + 1, (step + 1) * config.batch_size, *numbers,
                        learning_rate(step, config), seconds) for step, *numbers in rows])

    def _log_first_step(self, run, seconds):
        self.first_step_seconds = seconds
        if run.log:
            run.log.write(f"first step: {seconds:.2f} s")

    def _save(self, run):
        distributed.from_first(run.save, {**self.state, "model": self.jet.state_dict(),
                                          "optimizer": self.optimizer.state_dict()["state"]})

    def _evaluation_is_due(self):
        """Whether the state is one to be evaluated, and was not."""
        step, every = self.state["step"], self.config.eval_every
        is_due = step == self.config.total_steps or (
            every and step > self.config.extends and step % every == 0)
        return is_due and not any(row["step"] == step for row in self.state["rows"])

    def _evaluate(self, run, bar, pace, clock):
        """Add a row for the test images, all of them, and before it one for training images.

        No training time, and eager: else each of its batch sizes would be compiled.
        """
        num_train, rows = min(TRAIN_ROW_IMAGES, len(self.images["test"].array)), []
        eager = contextlib.nullcontext()
        if self.compiled:  # imports the compiler, which takes seconds
            eager = torch.compiler.set_stance("force_eager")
        with clock.paused(), eager:
            for split, images in (("train", self.images["train"].first(num_train)),
                                  ("test", self.images["test"])):
                numbers = evaluate(self.jet, images, per_image=True, each_batch=functools.partial(
                    pace.evaluated, run.log, bar, f"{len(images.array):,} {split} images"))
                self.per_image = numbers.pop("bits_per_dim_per_image")
                rows.append({"step": self.state["step"], "split": split, **numbers})
            run.add_evaluation(rows, self.jet)
        self.state["rows"] += rows

    def end(self, run):
        """done.json's content, which is written; {"step": ...} of a run that was stopped."""
        state = self.state
        if not state["rows"] or state["rows"][-1]["step"] < self.config.total_steps:
            if run.log:
                run.log.write(f"stopped at step {state['step']}")
            return {"step": state["step"]}
        test, train_images = state["rows"][-1], self.images["train"]
        done = {"config": self.config.to_record(), "rows": state["rows"],
                **{name: test[name] for name in ("bits_per_dim", "bits_per_dim_se", "num_images")},
                "weights_sha256": weights_checksum(self.jet),
                "num_params": sum(parameter.numel() for parameter in self.jet.parameters()),
                "train_seconds": state["seconds"], "first_step_seconds": self.first_step_seconds,
                "micro_batch": state["micro_batch"],
                "checkpoint_activations": self.jet.checkpoint_activations,
                "compile": self.compiled, "graph": self.graph, "hosts": self.hosts,
                "peak_memory_gib": distributed.agree(self.peak_memory() or 0.0)[0] or None,
                "dataset": self.images["test"].name, "variant": self.images["test"].variant,
                "train_fingerprint": train_images.fingerprint,
                "test_fingerprint": self.images["test"].fingerprint,
                "device": self.device.type, "hardware": hardware(self.device),
                "threads": self.place.threads, "processes": self.processes,
                "kernels": self.kernels, **self.code_version, **versions()}
        return distributed.from_first(run.finish, done, self.per_image)


def first_jet(config, images, init_from, run_dir):
    """The Jet before training, checked against the images and the weights that it begins with."""
    height, width, channels = images.array.shape[1:]
    if (channels, height, width) != config.model.image_shape:
        raise TrainingError(f"{config.data} has images of {height} x {width} x {channels}; the "
                            f"model takes image_size={config.model.image_size} and "
                            f"channels={config.model.channels}")
    refuse_too_large(config.model)
    if not config.init or run_folder.has_checkpoint(run_dir):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # that of GPUs plays no part
            return Jet(config.model)
    if init_from is None:
        raise TrainingError(f"{run_dir} begins with the weights {config.init}: give the run folder "
                            "or file that holds them (--init-from)")
    weights = opened(init_from)
    if config.init not in (found := weights_names(weights)):
        raise TrainingError(f"{init_from} holds the weights {found[0]}, and this run begins with "
                            f"{config.init}: give that one's run folder or file")
    return load_jet(weights, **vars(config.model))  # refuses another value of a field by name


def weights_names(path):
    """The names that TrainConfig.init may give the weights in a run folder or file.

    Of a finished run the hash of its configuration, too: it is known before there are weights.
    """
    path = opened(path)
    config, step = weights_config(path)
    is_final = config is not None and step == config.total_steps
    return (weights_id(path), config.hash) if is_final else (weights_id(path),)


def config_from_flags(flags):
    """TrainConfig from parsed flags.

    Where weights are given the model is theirs; image size and channels are the set's unless given.
    """
    top = {name: flags[name] for name in TrainConfig.__dataclass_fields__ if name in flags}
    model = model_fields(flags)
    if flags.get("extend_to") is not None:
        run = flags["init_from"]
        weights = opened(run) if run else None
        before, step = weights_config(weights) if run else (None, None)
        if before is None or not 0 < step == before.total_steps:
            raise TrainingError("--extend-to: --init-from must be the folder of a finished run of "
                                f"ours, and is {run or 'not given'}; alone it trains any weights")
        return extension(before, run, weights_id(weights), flags["extend_to"], top, model)
    height, width, channels = image_shape(top.get("data", TrainConfig.data), flags.get("data_root"))
    if flags.get("init_from") == "":
        raise TrainingError("--init-from is empty: give a run folder or weight file, or leave it "
                            "out")
    if flags.get("init_from") is not None:
        weights = opened(flags["init_from"])
        model = vars(load_jet(weights, **model).config)
        top["init"] = weights_id(weights)
    if top.get("condition", "none") != "none" and "context_dim" not in model:
        images = load_images(top.get("data", TrainConfig.data), "train", flags.get("data_root"))
        if images.labels is None:
            raise TrainingError(f"--condition {top['condition']}: {images.name} has no labels: "
                                "give images with labels, or leave it out")
        model["context_dim"] = int(images.labels.max()) + 1
    model = {"image_size": (height, width), "channels": channels} | model
    return TrainConfig(model=JetConfig(**model), **top)


def main(arguments=None):
    parser = ArgumentParser(prog="train.py", description=__doc__)
    add_setting_flags(parser.add_argument_group("what is computed"), TrainConfig)
    add_setting_flags(parser.add_argument_group("the model"), JetConfig, "model.")
    where_flags = parser.add_argument_group("where it runs")
    add_place_flags(where_flags)
    where_flags.add_argument("--init-from", metavar="RUN_OR_CHECKPOINT",
                             help="begin with the weights of this run folder or weight file: the "
                                  "model is theirs, the schedule is new (give a lower --lr)")
    where_flags.add_argument("--extend-to", type=int, metavar="STEPS",
                             help="a new run, up to this step, from the end of the finished run "
                                  "--init-from: its weights, moments and settings, with a learning "
                                  "rate schedule of its own")
    where_flags.add_argument("--run-dir", metavar="DIR",
                             help="run folder (default: runs/<set>-<hash of the config>)")
    flags = vars(parser.parse_args(arguments))
    with one_line_errors(parser.prog):
        place = place_from_flags(flags)
        distributed.start(place.process_timeout_s)
        try:
            config = distributed.from_first(config_from_flags, flags)
        except UserError:
            raise
        except ValueError as error:
            parser.error(str(error))
        begun = f"-from-{config.extends}" if config.extends else ""
        run_dir = Path(flags["run_dir"] or
                       ROOT / f"runs/{Path(config.data).stem}-{config.hash}{begun}")
        is_first = distributed.rank() == 0
        if is_first:
            print(f"run folder {run_dir}, seed {config.seed}", flush=True)
        with Signals().on() as signals:
            done = train(config, run_dir, place=place, signals=signals,
                         init_from=flags["init_from"])
        if "bits_per_dim" not in done:
            stopped = f"{parser.prog}: stopped at step {done['step']}: the same command goes on"
            signals.end_program(stopped if is_first else "")
        distributed.leave()
        if is_first:
            print_result(config, done)


def print_result(config, done):
    is_same = done["test_fingerprint"] == done["train_fingerprint"]
    note = " (the training images themselves)" if is_same else ""
    print(f"{done['bits_per_dim']:.4f} +- {done['bits_per_dim_se']:.4f} bits/dim on "
          f"{done['num_images']:,} test images of {done['dataset']}{note}, variant "
          f"{done['variant']}, fingerprint {done['test_fingerprint'][:12]}; "
          f"{config.total_steps - config.extends:,} steps in {done['train_seconds']:.0f} s on "
          f"{done['hardware']}")


if __name__ == "__main__":
    main()
