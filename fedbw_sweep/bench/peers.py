"""Codecs of other packages, where they are installed, to be measured beside ours.

A payload holds all that its `Codec.decode` needs besides the layout: a federated-learning package's
own message where it has one, else the raw bytes of every tensor that the package's decoder takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import packages_distributions, version
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.compression.base import all_finite
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.seeding import rng_for

Adapter = Callable[[Layout], Iterator[Codec]]
"""Yields a package's codecs for one layout."""


def working(package: str, adapter: Adapter, layout: Layout, update: FloatVector) -> Iterator[Codec]:
    """Yield the codecs of a peer package that work, with its version in their names.

    Parameters
    ----------
    package : str
        The name it is imported by; it is installed.
    adapter : callable
        What yields its codecs.
    layout : Layout
        The arrays an update is made of.
    update : ndarray of float32, shape (layout.size,)
        An update each codec must bring back, in shape and finite, to be yielded.

    Warns
    -----
    RuntimeWarning
        If the package or a codec of it does not work, with its error.
    """
    with _reported(package):
        distribution = packages_distributions()[package][0]
        for codec in adapter(layout):
            with _reported(codec.name):
                decoded = codec.decode(codec.encode(update, rng_for(0, "peers")))
                if decoded.shape != update.shape or not all_finite(decoded):
                    raise ValueError("decoded to another shape, NaN or infinity")
                named = f"{codec.name} ({distribution} {version(distribution)})"
                yield replace(codec, name=named)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever another package raises
        message = f"{name} is left out: {type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _by_name(layout: Layout, update: FloatVector) -> dict[str, FloatVector]:
    return {tensor.name: array for tensor, array in layout.split(update)}


def _torchao(layout: Layout) -> Iterator[Codec]:
    import torch
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    shape, block = (ceil(layout.size / 128), 128), (1, 128)

    def encode(bits: int, update: FloatVector, _: np.random.Generator) -> bytes:
        groups = torch.from_numpy(np.pad(update, (0, -layout.size % 128)).reshape(shape))
        kind = (torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scale, zero = choose_qparams_affine(groups, MappingType.SYMMETRIC, block, *kind)
        values = quantize_affine(groups, block, scale, zero, *kind).numpy().ravel()
        if bits == 4:  # two to the byte, as torchao's packed layouts hold them
            values = values[::2] & 15 | values[1::2] << 4
        return bytes(values.tobytes() + scale.numpy().tobytes())

    def decode(bits: int, payload: bytes) -> FloatVector:
        scale = np.frombuffer(payload, np.float32, offset=shape[0] * 128 * bits // 8)
        values = np.frombuffer(payload, np.int8, count=shape[0] * 128 * bits // 8)
        if bits == 4:
            values = np.stack([values << 4 >> 4, values >> 4], axis=-1)
        groups = torch.tensor(values.reshape(shape))
        decoded = dequantize_affine(groups, block, torch.tensor(scale), None, torch.int8)
        return np.asarray(decoded.numpy().ravel()[: layout.size])

    for bits in (8, 4):
        yield Codec(f"torchao int{bits} group 128", partial(encode, bits), partial(decode, bits))


def _bitsandbytes(layout: Layout) -> Iterator[Codec]:
    import torch
    from bitsandbytes import functional

    def encode(quantise: Callable[[Any], Any], update: FloatVector, _: Any) -> bytes:
        values, state = quantise(torch.from_numpy(update))
        return bytes(values.numpy().tobytes() + state.absmax.numpy().tobytes())

    def decode(dequantise: Callable[[Any, Any], Any], length: int, payload: bytes) -> FloatVector:
        values = torch.tensor(np.frombuffer(payload, np.uint8, length)).reshape(-1, 1)
        scales = torch.tensor(np.frombuffer(payload, np.float32, offset=length))
        return np.asarray(dequantise(values, scales).numpy().ravel())

    def int8(values: Any, scales: Any) -> Any:
        return functional.dequantize_blockwise(values, absmax=scales)

    def nf4(values: Any, scales: Any) -> Any:
        how = {"blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}
        state = functional.QuantState(scales, torch.Size([layout.size]), **how)
        return functional.dequantize_4bit(values, state)

    yield Codec(
        "bitsandbytes int8 block 4096",
        partial(encode, functional.quantize_blockwise),
        partial(decode, int8, layout.size),
    )
    yield Codec(
        "bitsandbytes nf4 block 64",
        partial(encode, partial(functional.quantize_4bit, blocksize=64, quant_type="nf4")),
        partial(decode, nf4, ceil(layout.size / 2)),
    )


def _openfl(layout: Layout) -> Iterator[Codec]:
    from openfl.pipelines import EdenPipeline
    from openfl.protocols.base_pb2 import MetadataProto, ModelProto, NamedTensor

    def encode(pipeline: Any, update: FloatVector, rng: np.random.Generator) -> bytes:
        np.random.seed(rng.integers(2**32))  # noqa: NPY002  Eden draws its seeds from it
        tensors = []
        for name, array in _by_name(layout, update).items():
            data, metadata = pipeline.forward(array)
            protos = [MetadataProto(**entry) for entry in metadata]
            tensors.append(NamedTensor(name=name, data_bytes=data, transformer_metadata=protos))
        return bytes(ModelProto(tensors=tensors).SerializeToString())

    def decode(pipeline: Any, payload: bytes) -> FloatVector:
        arrays = {}
        for tensor in ModelProto.FromString(payload).tensors:
            [proto] = tensor.transformer_metadata
            if proto.int_to_float:
                metadata = {"int_list": proto.int_list, "int_to_float": dict(proto.int_to_float)}
                array = pipeline.backward(tensor.data_bytes, [metadata])
            else:  # dense; OpenFL's own reader of these fails with NumPy 2.4
                array = np.frombuffer(tensor.data_bytes, np.float32)
            arrays[tensor.name] = array.ravel()
        return np.concatenate([arrays[tensor.name] for tensor in layout.floats])

    for bits in (1, 2, 4):
        pipeline = EdenPipeline(n_bits=bits)
        yield Codec(
            f"OpenFL Eden {bits} bit", partial(encode, pipeline), partial(decode, pipeline), True
        )


def _fedlab(layout: Layout) -> Iterator[Codec]:
    import torch
    from fedlab.contrib.compressor.topk import TopkCompressor

    compressor = TopkCompressor(0.01)

    def encode(update: FloatVector, _: np.random.Generator) -> bytes:
        parts = (
            part.numpy().tobytes()
            for _, array in layout.split(update)
            for part in compressor.compress(torch.from_numpy(array))
        )
        return b"".join(parts)

    def decode(payload: bytes) -> FloatVector:
        start, arrays = 0, []
        for tensor in layout.floats:
            kept = ceil(tensor.size * 0.01)
            values = torch.tensor(np.frombuffer(payload, np.float32, kept, start))
            indices = torch.tensor(np.frombuffer(payload, np.int64, kept, start + 4 * kept))
            arrays.append(compressor.decompress(values, indices, (tensor.size,)).numpy())
            start += 12 * kept
        return np.concatenate(arrays)

    yield Codec("FedLab top-1%", encode, decode)


def _nvflare(layout: Layout) -> Iterator[Codec]:
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
    from nvflare.fuel.utils import fobs

    numpy_decomposers.register()

    def encode(kind: str, update: FloatVector, _: np.random.Generator) -> bytes:
        message = DXO(DataKind.WEIGHT_DIFF, data=_by_name(layout, update))
        message = ModelQuantizer(kind).process_dxo(message, Shareable(), FLContext())
        return bytes(fobs.dumps(message.to_shareable()))

    def decode(payload: bytes) -> FloatVector:
        message = from_shareable(fobs.loads(payload))
        arrays = ModelDequantizer().process_dxo(message, Shareable(), FLContext()).data
        return np.concatenate([arrays[tensor.name].ravel() for tensor in layout.floats])

    for kind in ("float16", "adaquant", "blockwise8", "normfloat4"):  # the last two need a GPU
        yield Codec(f"NVFlare {kind}", partial(encode, kind), decode)


def _pysz(layout: Layout) -> Iterator[Codec]:
    from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode

    def encode(config: Any, update: FloatVector, _: np.random.Generator) -> bytes:
        return bytes(sz.compress(update, config)[0].tobytes())

    def decode(payload: bytes) -> FloatVector:
        data = np.frombuffer(payload, np.uint8)
        return np.asarray(sz.decompress(data, np.float32, (layout.size,))[0])

    def configured(mode: str, bound: float) -> Any:
        config = szConfig()
        config.errorBoundMode = getattr(szErrorBoundMode, mode.upper())
        setattr(config, f"{mode}ErrorBound", bound)
        return config

    # Neighbours in an update tell little of each other: without prediction SZ3 needs fewer bits,
    # and two dimensions help neither way.
    for mode, bound in (("abs", 5e-3), ("abs", 2e-3), ("rel", 1e-3)):
        yield Codec(f"SZ3 {mode} {bound}", partial(encode, configured(mode, bound)), decode)
        plain = configured(mode, bound)
        plain.cmprAlgo = szAlgorithm.NOPRED
        yield Codec(f"SZ3 {mode} {bound} no prediction", partial(encode, plain), decode)

    # FedSZ, as APPFL has it: each tensor of over 1,024 elements by itself, relative to its range.
    # APPFL's own wrapper needs an SZ3 that is built from source.
    large = [tensor.size > 1024 for tensor in layout.floats]

    def encode_each(config: Any, update: FloatVector, rng: np.random.Generator) -> bytes:
        parts = [
            encode(config, array.ravel(), rng) if is_large else array.tobytes()
            for (_, array), is_large in zip(layout.split(update), large, strict=True)
        ]
        return np.array([len(part) for part in parts], "<u4").tobytes() + b"".join(parts)

    def decode_each(payload: bytes) -> FloatVector:
        ends = 4 * len(large) + np.cumsum(np.frombuffer(payload, "<u4", len(large)))
        parts = [payload[a:b] for a, b in pairwise([4 * len(large), *ends.tolist()])]
        arrays = [
            np.asarray(sz.decompress(np.frombuffer(part, np.uint8), np.float32, (tensor.size,))[0])
            if is_large
            else np.frombuffer(part, np.float32)
            for part, tensor, is_large in zip(parts, layout.floats, large, strict=True)
        ]
        return np.concatenate([np.empty(0, np.float32), *arrays])

    for bound in (0.1, 0.03, 0.01):
        config = configured("rel", bound)
        yield Codec(f"FedSZ SZ3 rel {bound}", partial(encode_each, config), decode_each)


def _nncodec(layout: Layout) -> Iterator[Codec]:
    from nncodec.nnc import compress, decompress

    def encode(qp: int, update: FloatVector, _: np.random.Generator) -> bytes:
        arrays = {t.name: array.reshape(t.shape) for t, array in layout.split(update.copy())}
        # By default what is no weight of a layer is quantised far finer than the rest, and a file
        # is left in the working directory.
        how = {"nonweight_qp": qp, "bitstream_path": None, "return_bitstream": True}
        return bytes(compress(arrays, qp=qp, **how))

    def decode(payload: bytes) -> FloatVector:
        arrays = decompress(bytearray(payload))
        return np.concatenate([np.float32(arrays[t.name]).ravel() for t in layout.floats])

    for qp in (-24, -30, -36, -42):
        yield Codec(f"NNCodec qp {qp}", partial(encode, qp), decode)


def _bytes_codec(
    name: str, compress: Callable[[bytes], Any], decompress: Callable[[bytes], Any]
) -> Codec:
    return Codec(
        name,
        lambda update, _: bytes(compress(update.tobytes())),
        lambda payload: np.frombuffer(decompress(payload), np.float32),
    )


def _blosc2(_: Layout) -> Iterator[Codec]:
    import blosc2

    how = {"codec": blosc2.Codec.ZSTD, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    compress = partial(blosc2.compress2, typesize=4, **how)
    yield _bytes_codec("blosc2 zstd+shuffle", compress, partial(blosc2.decompress2, nthreads=1))


def _zipnn(_: Layout) -> Iterator[Codec]:
    from zipnn import ZipNN

    coder = ZipNN(bytearray_dtype="float32", threads=1)
    yield _bytes_codec("zipnn", coder.compress, coder.decompress)


def _zstandard(_: Layout) -> Iterator[Codec]:
    import zstandard

    compress = zstandard.ZstdCompressor(level=3).compress
    yield _bytes_codec("zstandard level 3", compress, zstandard.ZstdDecompressor().decompress)


ADAPTERS: dict[str, Adapter] = {
    "openfl": _openfl,
    "fedlab": _fedlab,
    "nvflare": _nvflare,
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
    "nncodec": _nncodec,
    "pysz": _pysz,
    "blosc2": _blosc2,
    "zipnn": _zipnn,
    "zstandard": _zstandard,
}
"""What yields each peer package's codecs, by the name it is imported by."""
