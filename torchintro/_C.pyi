from typing import TypedDict

class _BuildInfo(TypedDict):
    torch: str
    cuda: str
    cuda_architectures: str
    compiler: str
    cxx_standard: int

def build_info() -> _BuildInfo: ...
def cpu_level() -> str: ...
def matrix_route() -> str: ...
