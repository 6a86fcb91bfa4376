#!/usr/bin/env bash
# Makes .venv and installs the locked packages into it, with uv. The Makefile calls it when a stamp is out of date:
#
#     requirements/install.sh light      virtual environment, light.lock and dev.lock, which are what `make check` and
#                                        `make test-unit` need, Millstream itself            -> .venv/.light-installed
#     requirements/install.sh cpu        virtual environment, cpu.lock, Millstream itself    -> .venv/.cpu-installed
#     requirements/install.sh dev        the servers of the tests, on top of both            -> .venv/.dev-installed
#     requirements/install.sh clients    clients.lock, apart in .venv/clients                -> .venv/.clients-installed
#     requirements/install.sh peers      peers.lock, apart in .venv/peers                    -> .venv/.peers-installed
#
# k8s/Dockerfile calls it for the two images, where VARIANT is cpu or gpu:
#
#     requirements/install.sh packages-VARIANT   virtual environment with VARIANT.lock alone
#     requirements/install.sh system-VARIANT     only what the system must have to run it: Debian packages, no .venv
#
# The stamp is written last, so whatever stops an install (a failure, Ctrl-C, kill -9, a power cut), the next run
# repairs it. Safe to start twice at the same time: the second run waits for the first.
#
# Packages come from where pip is configured to look (requirements/uv.py). torch comes from there too if its CPU build is
# there, otherwise from PyTorch's index of CPU builds, or from MILLSTREAM_TORCH_INDEX alone: an address or a folder.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=$PWD/.venv
readonly UV_VERSION=0.13.9
readonly UV=("$VENV/bin/python" requirements/uv.py)
readonly PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# What the wheels load from outside themselves and a minimal Debian lacks (ldd over all of .venv): name, Debian package.
readonly SYSTEM_LIBRARIES=("libnuma.so.1 libnuma1")

child= # process id of the command that `run` runs
step=  # the step under way, for messages

main() {
    case "${1-}" in
        light) inputs=(requirements/light.lock requirements/dev.lock pyproject.toml) ;;
        cpu) inputs=(requirements/cpu.lock pyproject.toml) ;;
        dev) inputs=("$VENV/.light-installed" "$VENV/.cpu-installed") ;;
        clients) inputs=(requirements/clients.lock requirements/javascript/package-lock.json "$VENV/.dev-installed") ;;
        peers) inputs=(requirements/peers.lock "$VENV/.clients-installed") ;;
        packages-cpu | packages-gpu) inputs=("requirements/${1#*-}.lock") ;;
        system-cpu | system-gpu)
            "install_${1/-/_}"
            return
            ;;
        *) fail "usage: requirements/install.sh light|cpu|dev|clients|peers|packages-cpu|packages-gpu|system-cpu|system-gpu" ;;
    esac
    readonly stamp=$VENV/.$1-installed started=$VENV/.$1-installing

    # The lock is on the folder, so it needs no file and outlives a deleted .venv. uv inherits it: as long as the uv of a
    # killed run lives, nobody else touches the environment.
    exec 9<requirements
    if ! flock --nonblock 9; then
        echo "Another run is installing into .venv; waiting for it."
        flock 9
    fi
    is_fresh && return

    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    mkdir -p "$VENV"
    # What an interrupted run left half installed looks whole to uv; from its cache a reinstallation takes seconds.
    repair=()
    [[ -e $started ]] && repair=(--reinstall)
    rm -f "$stamp"
    printf '%s\n' "$VENV" >"$started"
    "install_${1/-/_}"
    mv "$started" "$stamp" # keeps the time of the start: an input edited meanwhile is newer and installed next time
}

install_light() {
    find_python
    make_venv 2
    begin "[2/2] $(count light) packages of requirements/light.lock, $(count dev) of requirements/dev.lock"
    run "${UV[@]}" pip install --no-deps "${repair[@]}" -r requirements/light.lock -r requirements/dev.lock
    install_millstream
}

install_cpu() {
    install_packages_cpu
    install_millstream
}

install_millstream() {
    run "${UV[@]}" pip install --quiet --no-deps --no-build-isolation --editable .
}

# Not compiled, unless UV_COMPILE_BYTECODE says so: the first import does that, and nine modules in ten are never imported.
install_packages_cpu() {
    find_python
    make_venv 4 $(missing_libraries)
    install_torch
    begin "[3/4] $(count cpu) packages of requirements/cpu.lock (3 GB the first time)"
    run "${UV[@]}" pip install --no-deps "${repair[@]}" -r <(grep -v '^torch==' requirements/cpu.lock)
    import_torch_and_vllm
}

# Not imported: vLLM's build for CUDA is not, where there is no GPU.
install_packages_gpu() {
    find_python
    make_venv 2 $(missing_libraries)
    begin "[2/2] $(count gpu) packages of requirements/gpu.lock"
    run "${UV[@]}" pip install --no-deps "${repair[@]}" -r requirements/gpu.lock
}

install_system_cpu() {
    find_python
    install_debian_packages $(missing_libraries)
}

# Triton and FlashInfer compile kernels on the machine with the GPU: a compiler, and Python's headers.
install_system_gpu() {
    find_python
    install_debian_packages $(missing_libraries) $(missing_for_compiling)
}

# make_venv STEPS [PACKAGE...]: as the first of so many, with `python`; Debian packages that are missing besides.
make_venv() {
    install_debian_packages $(missing_for_python) "${@:2}"
    if ! venv_is_sound; then
        begin "[1/$1] virtual environment .venv, with $("$python" --version)"
        find -H "$VENV" -mindepth 1 ! -path "$started" -delete
        run "$python" -m venv "$VENV"
    fi
    [[ $("$VENV/bin/uv" --version 2>/dev/null) == "uv $UV_VERSION"* ]] ||
        run "$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-deps --force-reinstall \
            "uv==$UV_VERSION"
}

import_torch_and_vllm() {
    begin "[4/4] import of torch, from $torch_source, and vLLM"
    "$VENV/bin/python" -c 'import torch' || fail "" \
        "The torch that $torch_source has as ${torch#*==} cannot be imported. Where a library of CUDA is missing" \
        "(libcudnn, libcublas, …) it is no build for CPUs: point MILLSTREAM_TORCH_INDEX at one that is, then run make again."
    run "$VENV/bin/python" -c 'from vllm import AsyncLLMEngine'
}

# First of all, and asked for before it is fetched: what the default index has under this version is the build for CUDA, of
# no use here, and whoever cannot get the other one should hear it before gigabytes are fetched. Sets torch_source.
install_torch() {
    local source answer answers='' sources=("" "$PYTORCH_CPU_INDEX")
    [[ ${MILLSTREAM_TORCH_INDEX-} ]] && sources=("$MILLSTREAM_TORCH_INDEX")
    torch=$(grep '^torch==' requirements/cpu.lock)
    begin "[2/4] $torch"
    for source in "${sources[@]}"; do
        torch_source=${source:-"the configured package sources"}
        if answer=$("${UV[@]}" ${source:+--only-from "$source"} pip install --dry-run --reinstall --no-deps "$torch" 2>&1); then
            run "${UV[@]}" ${source:+--only-from "$source"} pip install --no-deps "${repair[@]}" "$torch"
            return
        fi
        answers+=$torch_source:$'\n'$answer$'\n'
    done
    fail "$answers" \
        "The CPU build of torch ($torch) cannot be had from there, so nothing was fetched." \
        "Make PyTorch's index of CPU builds reachable ($PYTORCH_CPU_INDEX), or set" \
        "MILLSTREAM_TORCH_INDEX to the address of an index, or to a folder with the wheel, that has it; then run make again."
}

install_dev() {
    # The tests run servers of their own, in temporary folders.
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres >/dev/null ||
        install_debian_packages postgresql
    command -v promtool >/dev/null && command -v prometheus >/dev/null || install_debian_packages prometheus
    # Of the rehearsal: Redis for Ray's head, and packet filters.
    command -v redis-server >/dev/null || install_debian_packages redis-server
    command -v nft >/dev/null && command -v ip >/dev/null || install_debian_packages nftables iproute2
}

# Apart from the rest, because Ray imports pandas and pyarrow where it finds them: each of its processes would take
# 70 MB more in the tests than in `make serve`.
install_clients() {
    rm -rf "$VENV/clients"
    install_lock clients --target "$VENV/clients"
    # Of the test in a browser, which is skipped where Node.js or Chromium is not.
    if command -v npm >/dev/null; then
        rm -rf "$VENV/javascript"
        cp -R requirements/javascript "$VENV/javascript"
        run npm ci --silent --prefix "$VENV/javascript" --ignore-scripts --no-audit --no-fund
    fi
}

# Apart as well: some of it stands in for newer packages that Millstream runs with.
install_peers() {
    rm -rf "$VENV/peers"
    install_lock peers --target "$VENV/peers"
}

# install_lock NAME [UV_OPTION...]
install_lock() {
    begin "[1/1] $(count "$1") packages of requirements/$1.lock"
    run "${UV[@]}" pip install --no-deps "${repair[@]}" "${@:2}" -r "requirements/$1.lock"
}

is_fresh() {
    [[ -f $stamp && $(<"$stamp") == "$VENV" ]] || return 1
    local input
    for input in "${inputs[@]}"; do
        [[ $input -nt $stamp ]] && return 1
    done
    return 0
}

# Sets python: what is on PATH, or else what uv, pyenv or Debian have or get.
find_python() {
    local candidate
    for candidate in python3.11 python3; do
        is_3_11 "$candidate" && return
    done
    if command -v uv >/dev/null; then
        echo "Python 3.11: not on PATH, so from uv"
        uv python install --quiet 3.11 && is_3_11 "$(uv python find --no-project 3.11)" && return
    fi
    if command -v pyenv >/dev/null; then
        echo "Python 3.11: not on PATH, so from pyenv (where it has none yet it builds one, some minutes)"
        pyenv install --skip-existing 3.11 && is_3_11 "$(pyenv prefix "$(pyenv latest 3.11)")/bin/python" && return
    fi
    if apt-cache show python3.11 >/dev/null 2>&1; then
        echo "Python 3.11: not on PATH, so from Debian"
        install_debian_packages python3.11
        is_3_11 python3.11 && return
    fi
    fail "Python 3.11 is needed (the locked packages are built for it) and neither python3.11 nor python3 is it." \
        "Install it and put python3.11 on PATH, for instance:" \
        "    Debian 12:  apt-get install python3.11 python3.11-venv" \
        "    elsewhere:  pyenv install 3.11, or uv python install 3.11"
}

# is_3_11 COMMAND: if so, sets python to its path.
is_3_11() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && python=$(command -v "$1")
}

# Debian packages the standard library's ensurepip, without which there is no pip in a new environment, apart.
missing_for_python() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3.11-venv
}

# Debian's names of what the wheels lack.
missing_libraries() {
    local entry library
    for entry in "${SYSTEM_LIBRARIES[@]}"; do
        library=${entry% *}
        "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" 2>/dev/null || echo "${entry#* }"
    done
}

missing_for_compiling() {
    command -v g++ >/dev/null || echo g++
    "$python" -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' 2>/dev/null ||
        echo libpython3.11-dev
}

# install_debian_packages [PACKAGE...]: asks apt only for what is missing, and not at all when nothing is.
install_debian_packages() {
    (($#)) || return 0
    local as_root=()
    if ! command -v apt-get >/dev/null; then
        fail "Missing on this system: $* (names of the Debian packages)." \
            "There is no apt-get here: install what your system calls them, then run make again."
    elif ((EUID != 0)); then
        as_root=(sudo -n)
        sudo -n true 2>/dev/null || fail "Missing on this system: $*. Install them, then run make again:" \
            "    sudo apt-get update && sudo apt-get install -y --no-install-recommends $*"
    fi
    export DEBIAN_FRONTEND=noninteractive
    begin "system packages: $*"
    run "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update
    run "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

# Whether .venv was made whole, here (scripts carry absolute paths, so a moved copy is of no use) and with 3.11.
venv_is_sound() {
    "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null &&
        grep -qF -- "-m venv $VENV" "$VENV/pyvenv.cfg"
}

# count NAME: the packages of a lock.
count() { grep -c '^[A-Za-z]' "requirements/$1.lock"; }

# begin TITLE
begin() {
    step=$1
    printf '%s\n' "$step"
}

# run COMMAND...: in the background, so that `stop` is called at once and ends it.
run() {
    local status=0
    "$@" </dev/null &
    child=$!
    wait "$child" || status=$?
    child=
    ((status == 0)) || fail "" "This step failed with exit status $status: $step" \
        "The lines above say why. Once that is settled, make goes on from there." \
        "If that does not help, 'make clean' and the same command again begin with an empty .venv."
}

# stop STATUS: on Ctrl-C and kill. What runs in the background is not reached by Ctrl-C.
stop() {
    trap '' INT TERM HUP
    if [[ $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    printf '\nStopped during %s. The next make goes on from there.\n' "${step:-the start}" >&2
    exit "$1"
}

# fail LINE...
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

main "$@"
