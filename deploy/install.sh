#!/bin/sh
# Installs commonweight into a folder of its own, without root. Every package must have a SHA-256
# that a file in `locks` beside this script names; any other file is refused.
set -eu

usage() {
    cat <<'EOF'
usage: sh install.sh coordinator|agent [FOLDER] [WHEEL] [OPTION…]

FOLDER is ~/commonweight by default. Without WHEEL it is the wheel beside this script, as `make
wheel` puts it into dist/, or one that is built from the checkout. uv is used where it is installed,
else Python 3.11 or newer with pip (PYTHON=python3.12 chooses one).

  --torch cuda  an agent's PyTorch as PyPI has it, pinned by hash (the default). On Linux it
                contains CUDA and takes several gigabytes
  --torch cpu   on Linux, PyTorch's build without CUDA, from its own index (TORCH_INDEX chooses
                another one). Its version is pinned, its hash is not
  --bin DIR     links both programs into DIR (default: ~/.local/bin); --bin '' links nothing
  --service     starts the program with this machine: a service of the user
  --cluster     adds what a coordinator needs for a ledger in PostgreSQL and versions in an object
                store
  --dry-run     prints the commands and changes nothing
EOF
}

fail() { # fail MESSAGE…
    printf '%s\n' "$@" >&2
    exit 2
}

role='' folder='' wheel='' torch=cuda bin=$HOME/.local/bin service=false dry=false cluster=false
while [ $# -gt 0 ]; do
    case $1 in
        --torch | --bin)
            [ $# -gt 1 ] || fail "$1 needs a value" "$(usage)"
            case $1 in --torch) torch=$2 ;; --bin) bin=$2 ;; esac
            shift ;;
        --service) service=true ;;
        --cluster) cluster=true ;;
        --dry-run) dry=true ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "there is no option $1" "$(usage)" ;;
        *)
            if [ -z "$role" ]; then role=$1
            elif [ -z "$folder" ]; then folder=$1
            elif [ -z "$wheel" ]; then wheel=$1
            else fail "what is $1?" "$(usage)"; fi ;;
    esac
    shift
done
case $role in coordinator | agent) ;; *) fail "$(usage)" ;; esac
case $torch in cpu | cuda) ;; *) fail "--torch is cpu or cuda, not $torch" ;; esac
folder=${folder:-$HOME/commonweight}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
here=$(cd "$(dirname "$0")" && pwd)
lock=$here/locks/$role.txt
if $cluster; then
    [ "$role" = coordinator ] || fail "--cluster is for a coordinator"
    lock=$here/locks/cluster.txt
fi
[ -f "$lock" ] || fail "there is no $lock: copy the whole folder dist/ that \`make wheel\` made"
system=$(uname -s)

if command -v uv >/dev/null 2>&1; then
    tool=uv python=${PYTHON:->=3.11}
else
    tool=pip python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || fail \
        "commonweight needs Python 3.11 or newer: PYTHON=python3.12 sh install.sh $role" \
        "or install uv (https://docs.astral.sh/uv), which brings a Python"
fi

run() {
    if $dry; then echo "+ $*"; else "$@"; fi
}

environment() { # environment FOLDER
    case $tool in
        uv) run uv venv --quiet --allow-existing --python "$python" "$1" ;;
        pip) run "$python" -m venv "$1" ;;
    esac
}

install() { # install FOLDER ARGUMENTS…
    into=$1/bin/python; shift
    case $tool in
        uv) run uv pip install --quiet --python "$into" "$@" ;;
        pip) run "$into" -m pip install --quiet --disable-pip-version-check --no-input "$@" ;;
    esac
}

build() { # build FOLDER: a wheel of the checkout
    [ -f "$here/../pyproject.toml" ] || fail "name the wheel: sh install.sh $role FOLDER WHEEL"
    environment "$1/venv"
    install "$1/venv" --require-hashes -r "$here/locks/build.txt"
    case $tool in
        uv) run uv build --quiet --wheel --no-build-isolation --python "$1/venv/bin/python" \
            --out-dir "$1" "$here/.." ;;
        pip) run "$1/venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
            --no-build-isolation --wheel-dir "$1" "$here/.." ;;
    esac
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -z "$wheel" ]; then
    set -- "$here"/commonweight-*.whl
    if [ -e "$1" ]; then
        [ $# -eq 1 ] || fail "there are several wheels in $here: name one after FOLDER"
        wheel=$1
    else
        build "$scratch"
        for wheel in "$scratch"/commonweight-*.whl; do :; done
    fi
fi

cpu=false
if [ "$role" = agent ] && [ "$system" = Linux ]; then
    if [ "$torch" = cpu ]; then
        cpu=true
        version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$lock")
        awk '/^[^ ]/ { left_out = /^(torch|triton)==|^(nvidia|cuda)-/ } !left_out' "$lock" \
            >"$scratch/lock.txt"
        lock=$scratch/lock.txt
    elif ! command -v nvidia-smi >/dev/null 2>&1; then
        echo "this machine has no NVIDIA driver: --torch cpu would save several gigabytes" >&2
    fi
fi
environment "$folder"
install "$folder" --require-hashes --only-binary :all: -r "$lock"
if $cpu; then
    install "$folder" --no-deps --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" \
        "torch==$version"
fi
install "$folder" --no-deps --no-index "$wheel"

if [ -n "$bin" ]; then
    run mkdir -p "$bin"
    for program in commonweight commonweight-agent; do
        there=$bin/$program
        if { [ -e "$there" ] || [ -L "$there" ]; } && [ "$(readlink "$there")" != "$folder/bin/$program" ]
        then echo "left as it is: $there is of another installation" >&2
        else run ln -sf "$folder/bin/$program" "$there"; fi
    done
    case :$PATH: in
        *:"$bin":*) ;;
        *) echo "add this line to your shell's profile: export PATH=\"$bin:\$PATH\"" ;;
    esac
fi

unit() {
    cat <<EOF
[Unit]
Description=commonweight coordinator: aggregates what agents have learnt

[Service]
ExecStart="$(printf %s "$folder" | sed 's/%/%%/g')/bin/commonweight" up
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 4 5
TimeoutStopSec=60
KillMode=mixed
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
EOF
}

next="commonweight init, then commonweight up"
[ "$role" = coordinator ] || next="commonweight-agent join, then commonweight-agent up"
if $service && [ "$role" = agent ]; then
    if $dry || "$folder/bin/commonweight-agent" status id >/dev/null 2>&1; then
        run "$folder/bin/commonweight-agent" service install
        next="commonweight-agent status"
    else
        next="commonweight-agent join, then commonweight-agent service install"
    fi
elif $service && [ "$system" = Linux ]; then
    units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
    $dry || systemctl --user show-environment >/dev/null 2>&1 || fail \
        "installed, but not as a service: systemd does not run for this user" \
        "log in on the machine itself, not with su or in a container, or run: $folder/bin/commonweight up"
    run "$folder/bin/commonweight" init
    run mkdir -p "$units"
    if $dry; then echo "+ write $units/commonweight.service"; else
        unit >"$units/commonweight.service"
    fi
    run systemctl --user daemon-reload
    run systemctl --user enable --now commonweight.service
    echo "to keep it running after you log out: loginctl enable-linger"
    next="commonweight ticket create"
elif $service; then
    echo "this script installs the coordinator as a service on Linux only" >&2
fi
if $dry; then echo "nothing was changed"; else
    echo "installed: $folder/bin/commonweight and $folder/bin/commonweight-agent"
    echo "next: $next"
fi
