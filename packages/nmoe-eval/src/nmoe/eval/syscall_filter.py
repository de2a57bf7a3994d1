"""The system calls that a sandbox refuses, as a seccomp filter: those that make memory which belongs to no process's
resident set or address space, namespaces with rights of their own, and the kernel's less trodden parts."""

import platform
import struct

from nmoe.eval.errors import SandboxUnavailableError

_EPERM, _ENOSYS = 1, 38
_NEWUSER = 0x10000000
_X32 = 0x40000000
"""Calls of x86-64's other ABI carry this bit, and other numbers than those below."""

# AUDIT_ARCH of <linux/audit.h>, and numbers of <asm/unistd.h>.
_ARCHES = {
    "x86_64": (
        0xC000003E,
        {
            "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
            "unshare": 272, "setns": 308, "mount": 165, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
            "io_uring_setup": 425, "add_key": 248, "keyctl": 250, "clone": 56, "clone3": 435,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
            "unshare": 97, "setns": 268, "mount": 40, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
            "io_uring_setup": 425, "add_key": 217, "keyctl": 219, "clone": 220, "clone3": 435,
        },
    ),
}  # fmt: skip

# Of <linux/bpf_common.h> and <linux/seccomp.h>. The data are: int nr; u32 arch; u64 instruction pointer; u64 args[6].
_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _FAIL_WITH = 0x7FFF0000, 0x80000000, 0x00050000


def syscall_filter(machine: str | None = None) -> bytes:
    """A BPF program, as `bwrap --seccomp` takes it. Any call that it does not name is allowed; one of another ABI ends
    the process.

    `clone3`, whose flags a filter cannot see, "is not there": C libraries then use `clone`, which may do all but make a
    user namespace.

    Args:
        machine: as `platform.machine` names it; None: this one.

    Raises:
        SandboxUnavailableError: the machine's calls are not known.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in _ARCHES:
        raise SandboxUnavailableError(f"a machine of {' or '.join(_ARCHES)}, found {machine}")
    arch, numbers = _ARCHES[machine]
    refused = [number for name, number in numbers.items() if name not in ("clone", "clone3")]
    # Each: code, then how many to skip if true and if false, then the constant.
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in refused:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL_WITH | _EPERM)]
    program += [
        (_EQUAL, 0, 1, numbers["clone3"]),
        (_RETURN, 0, 0, _FAIL_WITH | _ENOSYS),
        (_EQUAL, 0, 3, numbers["clone"]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_OF, 0, 1, _NEWUSER),
        (_RETURN, 0, 0, _FAIL_WITH | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
