"""`python -m heatmill.kernels.build` compiles the kernels for every architecture into `kernels/cubins`."""

from __future__ import annotations

from .binaries import SHIPPED, compile_kernels, file_name, write_whole

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def main() -> None:
    for old in SHIPPED.glob("*.cubin"):
        old.unlink()
    for architecture in ARCHITECTURES:
        binary = compile_kernels(architecture)
        write_whole(SHIPPED / file_name(architecture), binary)
        print(f"{file_name(architecture)} {len(binary):,} bytes")


if __name__ == "__main__":
    main()
