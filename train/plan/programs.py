"""Every program of a run that takes the model's size, as the run calls it, and what lies in memory beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from falcon_relu.checkpoints.load import loading_programs
from falcon_relu.config import FalconConfig, family
from falcon_relu.generation import add_tokens, padded_length, read_prompts
from falcon_relu.sharding import abstract_params, init_program, param_shardings
from train.folder.checkpoints import checksums
from train.job import Job
from train.state import moments_program, teacher_copy
from train.watch import repeated, sampling_copy


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program of a run, from shapes.

    Attributes:
      phase: what the run does with it; a phase may take several programs, one after the other.
      when: the run does so.
      function: jitted; None where arrays are only copied to the host.
      arguments: of `function`: shapes with shardings, and static ones.
      beside: arrays that are on the devices too.
      to_host: arrays that are copied to the hosts.
    """

    phase: str
    when: str
    function: Any
    arguments: tuple[Any, ...] = ()
    beside: Any = ()
    to_host: Any = ()


Programs = Generator[Planned, Any, None]


def programs(job: Job) -> Programs:
    """The programs of a run, the training step first.

    The generator is sent what each program returns: shapes with the shardings that the compiler chose.
    """
    config = job.config
    state, teacher = job.abstract_state(), job.abstract_teacher()
    batch, rows = job.abstract_batch(config.data.batch_size), job.abstract_batch(job.microbatch)
    yield Planned("training step", "every step", job.train_step(), (state, batch, teacher))
    yield from _start(job)
    yield Planned("resuming", "at later starts", checksums, (state,))
    if job.teacher is not None:
        for function, arguments, others in loading_programs(job.teacher.config, job.teacher.dtype, job.mesh):
            when = "at later starts" if job.starts_from_teacher else "at every start"
            yield Planned("loading the teacher", when, function, arguments, (state, others))
    yield Planned(
        "validation",
        _when(config.validate_every, "at the end"),
        job.validation_step(),
        (state.params, rows, teacher),
        state.opt_state,
    )
    if config.samples.every:
        yield from _samples(job)
    saved = _when(config.checkpoint_every, "when stopped, and at the end")
    yield Planned("checkpoint", saved, checksums, (state,), teacher, to_host=state)
    yield Planned("finished weights", "at the end", None, beside=(state, teacher), to_host=state.params)


def _when(every: int, otherwise: str) -> str:
    return f"every {every} steps, {otherwise}" if every else otherwise


def _start(job: Job) -> Programs:
    config, mesh, state = job.config, job.mesh, job.abstract_state()
    when = "at the first start"
    if config.model is not None:
        phase, key = "initialisation", jax.eval_shape(jax.random.key, 0)
        params = yield Planned(phase, when, init_program(family(config.model), mesh), (key,))
    else:
        phase, params = "loading the student", _placed(job.student.config, mesh)
        for function, arguments, others in loading_programs(job.student.config, jnp.float32, mesh):
            yield Planned(phase, when, function, arguments, others)
    copy = None
    if job.teacher is not None and job.starts_from_teacher:
        copy = job.abstract_teacher()
        yield Planned(phase, when, teacher_copy, (params, job.teacher.dtype))
    if params != state.params:  # from the layout of a step to the one between steps
        yield Planned(phase, when, jax.jit(lambda x: x, out_shardings=job.shardings.params), (params,), copy)
    yield Planned(phase, when, moments_program(job.optimizer, job.shardings), (state.params,), copy)


def _placed(config: FalconConfig, mesh: Any) -> Any:
    """Parameters as they lie on the devices when they are loaded."""
    shapes, shardings = abstract_params(config), param_shardings(config, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _samples(job: Job) -> Programs:
    """A byte is taken for a token: no tokenizer of ours makes more of a text."""
    config, state, teacher = job.config, job.abstract_state(), job.abstract_teacher()
    phase, when, sampling = "samples", f"every {config.samples.every} steps", config.samples.sampling.of_program()
    copy = yield Planned(phase, when, sampling_copy(job.student, job.mesh), (state.params,), (state.opt_state, teacher))
    prompts = repeated([prompt.encode() for prompt in config.samples.prompts], job.mesh)
    T = padded_length(max(map(len, prompts)))
    tokens_BxT = jax.ShapeDtypeStruct((len(prompts), T), jnp.int32)
    lengths_B = jax.ShapeDtypeStruct((len(prompts),), jnp.int32)
    first = job.student, sampling, copy
    carry = yield Planned(phase, when, read_prompts, (*first, tokens_BxT, lengths_B), (state, teacher))
    last, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)
    yield Planned(phase, when, add_tokens, (*first, lengths_B, carry, last, key), (state, teacher))
