"""Markers that transformers' own tests use."""


def pytest_configure(config):
    for name in ("torch_compile_test", "generate"):
        config.addinivalue_line("markers", f"{name}: the host's")
