"""Fixtures of all tests: instruction sets and numbers of threads, both put back after each test."""

import pytest

import sparsetrain as st


@pytest.fixture(autouse=True)
def put_back():
    isa, threads = st.get_isa(), st.get_num_threads()
    yield
    st.set_isa(isa)
    st.set_num_threads(threads)


@pytest.fixture(params=st.available_isas())
def isa(request, put_back):
    """Each instruction set that this machine runs, in use."""
    st.set_isa(request.param)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request, put_back):
    st.set_num_threads(request.param)
    return request.param
