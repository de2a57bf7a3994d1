"""The filter as the kernel runs it: a small interpreter of its instructions."""

import struct

import pytest
from nmoe.eval.errors import SandboxUnavailableError
from nmoe.eval.syscall_filter import syscall_filter

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
# As <asm/unistd.h> has them: (audit arch, read, clone, clone3, memfd_create, shmget, unshare, io_uring_setup).
ARCHES = {
    "x86_64": (0xC000003E, 0, 56, 435, 319, 29, 272, 425),
    "aarch64": (0xC00000B7, 63, 220, 435, 279, 194, 97, 425),
}


def verdict(program, arch, number, argument=0):
    data = struct.pack("=iIQ6Q", number, arch, 0, argument, *[0] * 5)
    instructions = list(struct.iter_unpack("=HBBI", program))
    place, value = 0, 0
    while True:
        code, if_true, if_false, constant = instructions[place]
        place += 1
        match code:
            case 0x20:
                value = struct.unpack_from("=I", data, constant)[0]
            case 0x15:
                place += if_true if value == constant else if_false
            case 0x35:
                place += if_true if value >= constant else if_false
            case 0x45:
                place += if_true if value & constant else if_false
            case 0x06:
                return constant


@pytest.mark.parametrize("machine", ARCHES)
def test_what_is_refused_and_what_is_not(machine):
    arch, read, clone, clone3, *refused = ARCHES[machine]
    program = syscall_filter(machine)
    assert verdict(program, arch, read) == ALLOW
    assert [verdict(program, arch, number) for number in refused] == [EPERM] * len(refused)
    assert verdict(program, arch, clone3) == ENOSYS
    assert verdict(program, arch, clone, 0x3D0F00) == ALLOW, "a thread"
    assert verdict(program, arch, clone, 0x10000000 | 17) == EPERM, "a user namespace"


@pytest.mark.parametrize("machine", ARCHES)
def test_calls_of_another_abi_end_the_process(machine):
    arch, read, *_ = ARCHES[machine]
    program = syscall_filter(machine)
    assert verdict(program, 0x40000003, read) == KILL  # 32 bits
    assert verdict(program, arch, 0x40000000 | read) == KILL  # x32


def test_a_machine_whose_calls_are_unknown_is_refused():
    with pytest.raises(SandboxUnavailableError, match="found riscv64"):
        syscall_filter("riscv64")
