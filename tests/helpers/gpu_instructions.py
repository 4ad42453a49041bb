"""What GPU interpret mode lacks, done on its memory and barriers.

How a cluster's blocks reach each other, and copies without barriers: kernels do
that by instructions of their own, in `sparse_lm.kernels.mosaic_gpu`, which
interpret mode passes over.
"""

import collections
import dataclasses
import functools
import math
import time
from unittest import mock

from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.state import indexing
from jax.experimental import pallas as pl
import numpy as np

Interpreter = jaxpr_interpret.JaxprInterpreter
# Of barriers that hardware has: no other's number.
_CLUSTER = -1


@gpu_callbacks.fail_on_exception
def _send(token, mesh_location, thread, key, *arrays, blocks, shape):
  mine = gpu_callbacks.HostAllocationKey.from_array(key)
  memory = gpu_callbacks._get_shared_memory()
  number, block, place = map(np.asarray, arrays)
  # Neighbours of a row are written together: one at a time takes long.
  apart = ((np.diff(block) != 0) | (np.diff(place) != 1)
           | (place[1:] % shape[-1] == 0))
  for run in np.split(np.arange(len(block)), np.flatnonzero(apart) + 1):
    first = run[0]
    if not 0 <= block[first] < blocks:
      continue
    there = dataclasses.replace(mine, block_id=int(block[first]))
    while there not in memory.mem:  # That block has yet to start.
      memory.check_failed()
      time.sleep(1e-3)
    *row, column = map(int, np.unravel_index(place[first], shape))
    to = indexing.NDIndexer.from_indices_shape(
        (*row, pl.ds(column, len(run))), shape)
    gpu_callbacks._swap(token, mesh_location, thread, there.as_np_array,
                        (to,), number[run], None)
  return token


@gpu_callbacks.fail_on_exception
def _barrier(token, mesh_location, thread, *, threads, wait):
  memory = gpu_callbacks._get_shared_memory()
  barrier = memory.named_barrier(dataclasses.replace(thread, block_id=0),
                                 _CLUSTER, threads)
  where = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread)
  if wait:
    barrier.wait(thread, where)
  else:
    clock = memory.incr_clock(thread) if memory.detect_races else None
    barrier.arrive(thread, clock, where)
  return token


class _Rows:
  """Copies without barriers: they are made when a warpgroup waits for them."""

  def __init__(self):
    self._started = collections.defaultdict(list)
    self._committed = collections.defaultdict(list)

  def _key(self, thread):
    return thread.device_id, thread.block_id, thread.warpgroup_id

  @gpu_callbacks.fail_on_exception
  def start(self, token, mesh_location, thread, keys, transforms):
    (gmem, smem), (row, to) = keys, transforms
    _, x = gpu_callbacks._get(token, mesh_location, thread, gmem, row)
    # Until then, anything may lie there.
    gpu_callbacks._swap(token, mesh_location, thread, smem, to,
                        np.full_like(x, np.nan), None)
    self._started[self._key(thread)].append((gmem, row, smem, to))
    return token

  @gpu_callbacks.fail_on_exception
  def commit(self, token, mesh_location, thread):
    del mesh_location
    key = self._key(thread)
    self._committed[key] += self._started.pop(key, [])
    return token

  @gpu_callbacks.fail_on_exception
  def wait(self, token, mesh_location, thread):
    for gmem, row, smem, to in self._committed.pop(self._key(thread), []):
      _, x = gpu_callbacks._get(token, mesh_location, thread, gmem, row)
      gpu_callbacks._swap(token, mesh_location, thread, smem, to, x, None)
    return token


@gpu_callbacks.fail_on_exception
def _discard_line(token, mesh_location, thread, first, key, transforms, *,
                  shape, dtype):
  lost = np.full(128 // dtype.itemsize, np.nan, dtype)
  for number in np.asarray(first)[np.asarray(first) >= 0]:
    *row, column = map(int, np.unravel_index(number, shape))
    line = indexing.NDIndexer.from_indices_shape(
        (*row, pl.ds(column, len(lost))), shape)
    gpu_callbacks._swap(token, mesh_location, thread, key, (*transforms, line),
                        lost, None)
  return token


def interpreted():
  """A context in which interpret mode runs these instructions."""
  otherwise, rows = Interpreter._interpret_inline_mgpu_p, _Rows()

  def interpret(self, eqn, token, get_invals):
    name, arrays = eqn.params["mgpu_fn"].__name__, get_invals()
    if name == "cluster_send":
      *arrays, key = arrays
      arrays = key, *arrays
      run = functools.partial(_send, blocks=math.prod(self.cluster_dims),
                              shape=eqn.invars[-1].aval.shape)
    elif name == "row_copy":
      run = rows.start
      arrays = arrays[:2], eqn.params["pytree_ref_transforms"].unflatten(
          arrays[2:])
    elif name == "line_discard":
      _, transforms = eqn.params["pytree_ref_transforms"].unflatten(arrays[2:])
      arrays = *arrays[:2], transforms
      run = functools.partial(_discard_line,
                              shape=transforms[-1].get_indexer_shape(),
                              dtype=eqn.invars[1].aval.dtype)
    elif name in ("cluster_arrive", "cluster_wait"):
      run = functools.partial(_barrier, threads=self.num_concurrent_threads,
                              wait=name == "cluster_wait")
    elif name in ("row_commit", "row_wait"):
      run = rows.commit if name == "row_commit" else rows.wait
    else:
      return otherwise(self, eqn, token, get_invals)
    return callback.io_callback(
        run, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, self.mesh_location,
        self.thread, *arrays), []

  return mock.patch.object(Interpreter, "_interpret_inline_mgpu_p", interpret)
