"""Reading the generated text, the address-space check, and the translation to CUDA."""

from __future__ import annotations

import shutil
import subprocess

import mlx.core as mx
import pytest

from mlxlm.kernels.attention import metal
from tools.metal_emulator import KernelSource, attention_cases, capture, compiler
from tools.metal_emulator.source import parse, real_metal_kernel
from tools.metal_emulator.translate import pointers_without_space, to_cpp, to_cuda

needs_clang = pytest.mark.skipif(compiler.clang() is None, reason="the address-space check needs clang")


def generate(body: str, header: str = "", size: int = 64) -> KernelSource:
    """The text that MLX generates for a kernel with one input and one output."""
    kernel = real_metal_kernel()(
        name="probe", input_names=["a"], output_names=["out"], source=body, header=header, ensure_row_contiguous=False
    )

    def launch(a: mx.array) -> list[mx.array]:
        return kernel(
            inputs=[a], output_shapes=[(64,)], output_dtypes=[mx.float32], grid=(64, 1, 1), threadgroup=(64, 1, 1),
            verbose=True, stream=mx.gpu,
        )  # fmt: skip

    (found,) = capture(launch, mx.zeros((size,), dtype=mx.bfloat16))
    return found


def test_the_signature_is_read():
    found = generate("out[thread_position_in_grid.x] = float(a[0]) + a_strides[0] + a_ndim;", size=3)
    assert [(a.name, a.type, a.kind, a.space, a.writable) for a in found.arguments] == [
        ("a", "bfloat16_t", "pointer", "constant", False),
        ("a_strides", "int64_t", "pointer", "constant", False),
        ("a_ndim", "int", "reference", "constant", False),
        ("out", "float", "pointer", "device", True),
        ("thread_position_in_grid", "uint3", "attribute", "", False),
    ]


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="expected one kernel function in the text, found 0"):
        parse("void f() {}")


@pytest.mark.parametrize("translate", [to_cpp, lambda kernel: to_cuda(kernel, "k")], ids=["C++", "CUDA"])
def test_words_that_are_not_understood_are_refused(translate):
    odd = generate("out[0] = 1.0f;", header="template <typename T> void f(threadgroup T& x) {}\n")
    with pytest.raises(ValueError, match="line 1 of the kernel: don't know how to translate this use of 'threadgroup'"):
        translate(odd)


def test_comments_and_line_numbers_survive():
    text = generate("// threadgroup in a comment\n/* device\n constant */ out[0] = 1.0f;")
    assert "threadgroup" not in to_cpp(text)
    assert to_cpp(text).count("\n") >= text.text.count("\n") - 4


@pytest.fixture(scope="module")
def kernels() -> list[KernelSource]:
    """The kernels of cases that use everything, in every dtype."""
    everything = {
        "mask": "everything", "alibi": True, "relative_bias": True, "softcap": True, "sinks": True, "dropout": True,
        "bias": "B11S",
    }  # fmt: skip
    found = {}
    for case in (
        attention_cases.Case(**everything),
        attention_cases.Case(**everything, dtype="bfloat16", head_dim=256),
        attention_cases.Case(**everything, dtype="float16", queries=3, keys=1600),
        attention_cases.Case(head_dim=20, value_dim=33),
        attention_cases.Case(head_dim=200, value_dim=200),
    ):
        with attention_cases.emulated_attention(collecting=True) as device:
            attention_cases.results(metal.attention, attention_cases.make(case))
        found |= device.kernels
    return list(found.values())


@needs_clang
def test_the_attention_kernels_keep_their_address_spaces(kernels):
    assert len(kernels) > 25
    for kernel in kernels:
        assert compiler.check_address_spaces(kernel) == "", kernel.name


def test_the_attention_kernels_name_the_space_of_every_pointer(kernels):
    for kernel in kernels:
        assert pointers_without_space(kernel) == [], kernel.name


HELPER = "METAL_FUNC float first(const threadgroup float* x) { return x[0]; }\n"
BAD = {
    "device pointer for threadgroup memory": ("out[0] = first((const device float*)a);", HELPER, "first"),
    "cast to another space": ("out[0] = *(const threadgroup float*)(a);", "", "address space"),
    "write through const": ("threadgroup float t[4]; ((const threadgroup float*)t)[0] = 1.0f;", "", "const"),
    "threadgroup array in a helper": ("out[0] = f();", "inline float f() { threadgroup float t[4]; return 0; }\n", "t"),
    "threadgroup array in an inner block": ("{ threadgroup float t[4]; t[0] = 0.0f; }", "", "t"),
    "double": ("double x = 1; out[0] = float(x);", "", "double"),
    "device pointer kept in a thread pointer": ("thread bfloat16_t* p = a; out[0] = float(*p);", "", "p"),
}


@needs_clang
@pytest.mark.parametrize("name", BAD)
def test_the_address_space_check_rejects(name):
    body, header, word = BAD[name]
    message = compiler.check_address_spaces(generate(f"uint i = thread_position_in_grid.x; (void)i;\n{body}", header))
    assert "error" in message
    assert word in message


@needs_clang
def test_the_address_space_check_accepts_the_same_done_right():
    body = "threadgroup float t[64]; uint i = thread_position_in_grid.x; t[i] = float(a[i]); out[i] = first(t);"
    assert compiler.check_address_spaces(generate(body, HELPER)) == ""


@pytest.mark.parametrize("declaration", ["float* x", "const float& x", "Own* x", "const Own<3>& x", "float2 *x"])
def test_a_pointer_without_a_space_is_found(declaration):
    header = f"template <int N> struct Own {{ int y; }};\nMETAL_FUNC void f({declaration}) {{}}\n"
    assert len(pointers_without_space(generate("out[0] = 1.0f;", header))) == 1
    spaced = header.replace(declaration, f"const thread {declaration.removeprefix('const ')}")
    assert pointers_without_space(generate("out[0] = 2.0f * 3.0f;", spaced)) == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_attention_kernels_compile_as_cuda(kernels, tmp_path):
    for number, kernel in enumerate(kernels[::4]):
        file = tmp_path / f"{number}.cu"
        file.write_text('#include "cuda_shim.cuh"\n' + to_cuda(kernel, f"k{number}"))
        subprocess.run(
            ["nvcc", "-std=c++17", "-w", "-c", "-I", str(compiler.ENGINE), str(file), "-o", str(tmp_path / "x.o")],
            check=True, capture_output=True,
        )  # fmt: skip
