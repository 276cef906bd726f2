"""From Metal to C++ and CUDA, by the words that differ: address spaces, threadgroup arrays, the signature.

The rest of the text goes to the other compiler untouched, so what is tested is the kernel and not a port of it. Each
translation fails on words it does not understand rather than dropping them.
"""

from __future__ import annotations

import re

from tools.metal_emulator.source import KernelSource

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r"^[ \t]*#\s*include\s*<metal_\w+>[^\n]*$|^\s*using\s+namespace\s+metal\s*;[^\n]*$", re.MULTILINE)
_TYPE = r"[A-Za-z_]\w*(?:::\w+)*(?:\s*<[^<>;(){}]*>)?"
_POINTER = re.compile(
    rf"(?P<c1>\bconst\s+)?\b(?P<space>device|constant|threadgroup)\s+(?P<c2>const\s+)?(?P<type>{_TYPE})\s*\*"
)
_ARRAY = re.compile(rf"\bthreadgroup\s+(?P<type>{_TYPE})\s+(?P<name>\w+)\s*\[(?P<size>[^\]]+)\]\s*;")
_CONSTANT = re.compile(r"\b(static\s+)?constant\s+(constexpr\b|const\b)")
_SPACES = re.compile(r"\b(device|constant|threadgroup)\b")
_UNROLL = re.compile(r"clang loop unroll\(full\)")


def without_comments(text: str) -> str:
    """The text with comments blanked out; line numbers stay."""
    return _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def parts(kernel: KernelSource) -> tuple[str, str]:
    """Header and body of a kernel, without comments and includes; the body is what stands between its braces."""
    start, end = kernel.signature
    header, body = kernel.text[:start], kernel.text[end:].rstrip()
    if not body.endswith("}"):
        raise ValueError("the text after the kernel's body is not understood")
    header = _INCLUDE.sub("", without_comments(header))
    return header, without_comments(body[:-1])


def _check(text: str, where: str) -> str:
    left = _SPACES.search(text)
    if left:
        line = text.count("\n", 0, left.start()) + 1
        raise ValueError(f"line {line} of the {where}: don't know how to translate this use of '{left.group()}'")
    return text


# --------------------------------------------------------------------------------------------------- emulator


def to_cpp(kernel: KernelSource) -> str:
    """A C++ file for the emulator: pointers become checked ones, threadgroup arrays statics that know their bounds."""
    header, body = (_cpp_words(text) for text in parts(kernel))
    locals_ = []
    for index, argument in enumerate(kernel.arguments):
        const = "" if argument.writable else "const "
        if argument.kind == "pointer":
            kind = f"metal::{argument.space}_pointer<{const}{argument.type}>"
            region = f"emulator_regions[{index}]"
            locals_.append(f"{kind} {argument.name}({region}, ({const}{argument.type}*){region}->base);")
        elif argument.kind == "reference":
            locals_.append(
                f"{const}{argument.type}& {argument.name} = *({const}{argument.type}*)emulator_regions[{index}]->base;"
            )
        else:
            locals_.append(_attribute(argument.name, argument.type))
    # Inside namespace metal its names come before those of the C library, such as abs.
    return f"""#include "metal_stdlib.hpp"
static emulator::Region* emulator_arrays = nullptr;
namespace metal {{
namespace {{
{header}
void emulated(emulator::Region* const* emulator_regions, const emulator::Builtins& emulator_builtins) {{
(void)emulator_regions;
(void)emulator_builtins;
{" ".join(locals_)}
{body}
}}
}}
}}
extern "C" const emulator::Entry emulator_entry = metal::emulated;
extern "C" emulator::Region** const emulator_array_list = &emulator_arrays;
"""


def _attribute(name: str, kind: str) -> str:
    value = f"emulator_builtins.{name}"
    if kind == "uint3":
        value = f"uint3({value}[0], {value}[1], {value}[2])"
    return f"const {kind} {name} = {value};"


def _cpp_words(text: str) -> str:
    def pointer(match: re.Match[str]) -> str:
        const = "const " if match["c1"] or match["c2"] else ""
        return f"metal::{match['space']}_pointer<{const}{match['type']}> "

    def array(match: re.Match[str]) -> str:
        kind, name, size = match["type"], match["name"], match["size"]
        return (
            f'static metal::threadgroup_array<{kind}, ({size})> {name}_storage("{name}", &emulator_arrays); '
            f"const metal::threadgroup_pointer<{kind}> {name} = {name}_storage.begin();"
        )

    text = _ARRAY.sub(array, text)
    text = _POINTER.sub(pointer, text)
    text = _CONSTANT.sub(r"static \2", text)
    text = re.sub(r"\bthread\b", "", text)
    return _check(text, "kernel")


# ------------------------------------------------------------------------------------------------------- CUDA


def to_cuda(kernel: KernelSource, name: str) -> str:
    """A CUDA kernel `name` in a namespace of its own, for a file that includes cuda_shim.cuh."""
    header, body = (_cuda_words(text) for text in parts(kernel))
    parameters, locals_ = [], []
    for argument in kernel.arguments:
        const = "" if argument.writable else "const "
        if argument.kind == "pointer":
            parameters.append(f"{const}{argument.type}* {argument.name}")
        elif argument.kind == "reference":
            parameters.append(f"const {argument.type}* {argument.name}_pointer")
            locals_.append(f"const {argument.type}& {argument.name} = *{argument.name}_pointer;")
        else:
            locals_.append(f"const {argument.type} {argument.name} = metal::builtin_{argument.name}();")
    # Inside namespace metal its names come before CUDA's own, such as float2.
    return f"""namespace metal {{
namespace {name}_space {{
{header}
__global__ void {name}({", ".join(parameters)}) {{
{" ".join(locals_)}
{body}
}}
}}
}}
"""


def _cuda_words(text: str) -> str:
    text = _ARRAY.sub(r"__shared__ \g<type> \g<name>[\g<size>];", text)
    text = _POINTER.sub(lambda m: f"{'const ' if m['c1'] or m['c2'] else ''}{m['type']}*", text)
    text = _CONSTANT.sub(r"static \2", text)
    text = re.sub(r"\bthread\b", "", text)
    text = _UNROLL.sub("unroll", text)
    return _check(text, "kernel")


# ----------------------------------------------------------------------------------------- address-space check


def to_address_spaces(kernel: KernelSource) -> str:
    """A file in C++ for OpenCL: a pointer that loses or changes its address space does not compile."""
    header, body = parts(kernel)
    start, end = kernel.signature
    signature = re.sub(
        r"\[\[(?:buffer|\w+)(?:\(\d+\))?\]\]", "", kernel.text[start:end].replace("[[kernel]]", "__kernel", 1)
    )
    return f"""#include "address_spaces.hpp"
namespace metal {{
{header}
{signature}
{body}
}}
}}
"""


_BUILTIN_TYPES = (
    "bool|char|uchar|short|ushort|int|uint|long|ulong|float|half|bfloat|bfloat16_t|float16_t|size_t|"
    "u?int(?:8|16|32|64)_t"
)
_DECLARED = re.compile(r"\b(?:struct|class|typename|typedef\s+[\w<>:, ]+?)\s+(\w+)\s*(?=[;{,>:])")


def pointers_without_space(kernel: KernelSource) -> list[str]:
    """Declarations of pointers and references that name no address space: Metal rejects them, C++ does not.

    Seen by their types: built-in ones, and those that the text declares.
    """
    header, body = parts(kernel)
    text = header + body
    declared = "|".join(sorted(set(_DECLARED.findall(text))))
    types = rf"(?:{_BUILTIN_TYPES}|{declared})[234]?" if declared else rf"(?:{_BUILTIN_TYPES})[234]?"
    words = r"((?:\b(?:const|thread|device|constant|threadgroup)\s+)*)"
    found = re.finditer(rf"{words}\b{types}\s*(?:<[^<>;(){{}}]*>)?\s*[*&](?![&=])", text)
    return [match.group().strip() for match in found if match.group(1).strip() in ("", "const")]
