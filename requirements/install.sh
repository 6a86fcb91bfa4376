#!/usr/bin/env bash
# Makes .venv and installs the locked packages into it. The Makefile calls it when a stamp is out of date:
#
#     requirements/install.sh cpu        virtual environment, cpu.lock, Millstream itself    -> .venv/.cpu-installed
#     requirements/install.sh dev        dev.lock on top of it                               -> .venv/.dev-installed
#     requirements/install.sh clients    clients.lock, apart in .venv/clients                -> .venv/.clients-installed
#     requirements/install.sh peers      peers.lock, apart in .venv/peers                    -> .venv/.peers-installed
#
# The stamp is written last, so whatever stops an install (a failure, Ctrl-C, kill -9, a power cut), the next run
# repairs it. Safe to start twice at the same time: the second run waits for the first.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=$PWD/.venv
readonly SITE_PACKAGES=$VENV/lib/python3.11/site-packages
# What the wheels load from outside themselves and a minimal Debian lacks (ldd over all of .venv): name, Debian package.
readonly SYSTEM_LIBRARIES=("libnuma.so.1 libnuma1")
readonly PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
readonly INSTALL=(install --no-deps --progress-bar off --no-warn-script-location)

child=       # process id of the command that `run` runs
step=        # the step under way, for messages
on_terminal= # set when progress can be redrawn in place
[[ -t 1 ]] && on_terminal=1

main() {
    case "${1-}" in
        cpu) inputs=(requirements/cpu.lock pyproject.toml) ;;
        dev) inputs=(requirements/dev.lock "$VENV/.cpu-installed") ;;
        clients) inputs=(requirements/clients.lock requirements/javascript/package-lock.json "$VENV/.dev-installed") ;;
        peers) inputs=(requirements/peers.lock "$VENV/.clients-installed") ;;
        *) fail "usage: requirements/install.sh cpu|dev|clients|peers" ;;
    esac
    readonly stamp=$VENV/.$1-installed started=$VENV/.$1-installing log=$VENV/install-$1.log

    # The lock is on the folder, so it needs no file and outlives a deleted .venv. pip inherits it: as long as the pip
    # of a killed run lives, nobody else touches the environment.
    exec 9<requirements
    if ! flock --nonblock 9; then
        echo "Another run is installing into .venv; waiting for it."
        flock 9
    fi
    is_fresh && return

    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    trap 'rm -rf "$VENV/.tmp"' EXIT
    mkdir -p "$VENV"
    rm -rf "$VENV/.tmp" "$stamp"
    printf '%s\n' "$VENV" >"$started"
    : >"$log"
    "install_$1"
    mv "$started" "$stamp" # keeps the time of the start: an input edited meanwhile is newer and installed next time
}

install_cpu() {
    local python
    python=$(find_python)
    install_debian_packages "[0/3]" $(missing_for_python "$python")
    if venv_is_sound; then
        begin "[1/3] virtual environment: there already"
    else
        begin "[1/3] virtual environment .venv, with $("$python" --version)"
        run no_count find -H "$VENV" -mindepth 1 ! -path "$log" ! -path "$started" ! -path "$VENV/.tmp" -delete
        run no_count "$python" -m venv "$VENV"
    fi
    install_lock "[2/3]" cpu "2 to 5 minutes and 3 GB the first time"
    begin "[3/3] Millstream itself, editable"
    run no_count "${PIP[@]}" "${INSTALL[@]}" --no-build-isolation --editable .
}

install_dev() {
    # The tests run servers of their own, in temporary folders.
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres >/dev/null ||
        install_debian_packages "[0/1]" postgresql
    command -v promtool >/dev/null && command -v prometheus >/dev/null || install_debian_packages "[0/1]" prometheus
    # Of the rehearsal: Redis for Ray's head, and packet filters.
    command -v redis-server >/dev/null || install_debian_packages "[0/1]" redis-server
    command -v nft >/dev/null && command -v ip >/dev/null || install_debian_packages "[0/1]" nftables iproute2
    install_lock "[1/1]" dev "half a minute"
}

# Apart from the rest, because Ray imports pandas and pyarrow where it finds them: each of its processes would take
# 70 MB more in the tests than in `make serve`. Not compiled, because the tests import a tenth of them.
install_clients() {
    rm -rf "$VENV/clients"
    install_lock "[1/1]" clients "half a minute and 0.4 GB" --no-compile --target "$VENV/clients"
    # Of the test in a browser, which is skipped where Node.js or Chromium is not.
    if command -v npm >/dev/null; then
        rm -rf "$VENV/javascript"
        cp -R requirements/javascript "$VENV/javascript"
        run no_count npm ci --prefix "$VENV/javascript" --ignore-scripts --no-audit --no-fund
    fi
}

# Apart as well: some of it stands in for newer packages that Millstream runs with.
install_peers() {
    rm -rf "$VENV/peers"
    install_lock "[1/1]" peers "half a minute and 0.3 GB" --no-compile --target "$VENV/peers"
}

# install_lock NUMBER NAME DURATION [PIP_OPTION...]
install_lock() {
    local packages
    packages=$(grep -c '^[A-Za-z]' "requirements/$2.lock")
    begin "$1 $packages packages of requirements/$2.lock ($3)"
    remove_half_installed
    installed_before=$(count_installed)
    run count_packages "${PIP[@]}" "${INSTALL[@]}" "${@:4}" -r "requirements/$2.lock"
}

is_fresh() {
    [[ -f $stamp && $(<"$stamp") == "$VENV" ]] || return 1
    local input
    for input in "${inputs[@]}"; do
        [[ $input -nt $stamp ]] && return 1
    done
    return 0
}

find_python() {
    local candidate
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 is needed (the locked packages are built for it) and neither python3.11 nor python3 is it." \
        "Install it and put python3.11 on PATH, for instance:" \
        "    Debian 12:  apt-get install python3.11 python3.11-venv" \
        "    elsewhere:  pyenv install 3.11, or uv python install 3.11"
}

# missing_for_python PYTHON: Debian's names of what it and the wheels lack.
missing_for_python() {
    local entry library
    # Debian packages the standard library's ensurepip, without which there is no pip in a new environment, apart.
    "$1" -c 'import ensurepip, venv' 2>/dev/null || echo python3.11-venv
    for entry in "${SYSTEM_LIBRARIES[@]}"; do
        library=${entry% *}
        "$1" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" 2>/dev/null || echo "${entry#* }"
    done
}

# install_debian_packages NUMBER [PACKAGE...]: asks apt only for what is missing, and not at all when nothing is.
install_debian_packages() {
    local number=$1 missing=("${@:2}") as_root=()
    ((${#missing[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        fail "Missing on this system: ${missing[*]} (names of the Debian packages)." \
            "There is no apt-get here: install what your system calls them, then run make again."
    elif ((EUID != 0)); then
        as_root=(sudo -n)
        sudo -n true 2>/dev/null || fail "Missing on this system: ${missing[*]}. Install them, then run make again:" \
            "    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
    fi
    export DEBIAN_FRONTEND=noninteractive
    begin "$number system packages: ${missing[*]}"
    run no_count "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 update
    run no_count "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

# Whether .venv was made whole, here (scripts carry absolute paths, so a moved copy is of no use) and with 3.11.
venv_is_sound() {
    "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null &&
        grep -qF -- "-m venv $VENV" "$VENV/pyvenv.cfg"
}

# pip takes a package for installed once its METADATA is there, however few of its files are. It rewrites RECORD, with
# INSTALLER in it, as the last act of an install: where that is missing the install was cut short. Without its .dist-info
# pip installs the package again. ~name is what an interrupted upgrade leaves behind.
remove_half_installed() {
    local info
    for info in "$SITE_PACKAGES"/*.dist-info; do
        [[ -d $info ]] && ! grep -qs '\.dist-info/INSTALLER,' "$info/RECORD" && rm -rf "$info"
    done
    rm -rf "$SITE_PACKAGES"/~*
}

# begin TITLE
begin() {
    step=$1
    printf '%s\n' "$step"
}

# run COUNTER COMMAND...: the command's output goes to the log, one line of progress to the terminal, or one line every
# 15 s where there is none. COUNTER prints how far the command is.
run() {
    local counter=$1 began=$SECONDS next_line=15
    shift
    # Whatever is left in a temporary folder of our own by a killed pip (gigabytes) goes away with it.
    mkdir -p "$VENV/.tmp"
    printf '\n$ %s\n' "$*" >>"$log"
    TMPDIR=$VENV/.tmp "$@" </dev/null >>"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        if [[ $on_terminal ]]; then
            printf '\r\033[K      %s%s' "$("$counter")" "$(elapsed "$began")"
        elif ((SECONDS - began >= next_line)); then
            printf '      %s%s\n' "$("$counter")" "$(elapsed "$began")"
            ((next_line += 15))
        fi
    done
    [[ $on_terminal ]] && printf '\r\033[K'
    local status=0
    wait "$child" || status=$?
    child=
    ((status == 0)) || explain_failure "$status"
}

elapsed() { printf '%d:%02d' $(((SECONDS - $1) / 60)) $(((SECONDS - $1) % 60)); }

no_count() { :; }

# In the environment, and where pip collects what it is to install elsewhere (--target).
count_installed() {
    local targets=("$VENV"/.tmp/pip-target-*/lib/python)
    { find "$SITE_PACKAGES" "${targets[@]}" -maxdepth 1 -name '*.dist-info' 2>/dev/null || true; } | wc -l
}

# pip first fetches everything, a line in the log for each package, and then is silent until all are unpacked.
count_packages() {
    local present fetched
    present=$(grep -c '^Requirement already satisfied' "$log" || true)
    if grep -q '^Installing collected packages' "$log"; then
        printf '%d of %d unpacked, ' $((present + $(count_installed) - installed_before)) "$packages"
    else
        fetched=$(grep -c '^Collecting' "$log" || true)
        printf '%d of %d fetched, ' $((present + fetched)) "$packages"
    fi
}

# stop STATUS: on Ctrl-C and kill. pip runs in the background, where Ctrl-C does not reach it.
stop() {
    trap '' INT TERM HUP
    if [[ $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    printf '\nStopped during %s. The next make goes on from there.\n' "${step:-the start}" >&2
    exit "$1"
}

# explain_failure STATUS
explain_failure() {
    local advice="The line with ERROR says why. Once that is settled, make goes on from there."
    if grep -qi 'no space left on device' "$log"; then
        advice="The disk is full: .venv takes 3 GB, and as much again while it is being installed."
    elif grep -qiE 'name resolution|Could not fetch URL|Retrying \(|Connection refused|timed out' "$log"; then
        advice="A package index could not be reached: check the network, the proxy and '.venv/bin/pip config list'."
    elif grep -q 'No matching distribution found' "$log"; then
        advice="The lock names a version that no package index of '.venv/bin/pip config list' has. Correct the lock,
or point PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at one that has it."
    fi
    {
        printf '\nThis step failed with exit status %s: %s\nThe end of its output:\n\n' "$1" "$step"
        grep -vE '^(Requirement already satisfied|Looking in|WARNING: Location)' "$log" | tail -n 12 | cut -c 1-160 |
            sed 's/^/    /'
        printf '\nAll of it: %s\nWhat to do: %s\n' "${log#"$PWD"/}" "$advice"
        printf "If that does not help, 'make clean' and the same command again begin with an empty .venv.\n"
    } >&2
    exit 1
}

# fail LINE...
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

main "$@"
