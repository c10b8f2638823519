"""Bash completion of groups and keys for `distrain` and `python -m distrain`.

Hydra's own script does not support `python -m`; this one queries Hydra for the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

_FLAGS = ("-sc", "--shell-completion")

INSTALL = r"""_distrain_complete()
{
    local line=${COMP_LINE:0:COMP_POINT} command=() flags=() words=() word choices prefix
    read -ra words <<< "$line"
    command=("${words[0]}")
    if [[ ${words[1]} == -m && ${words[2]} == distrain ]]; then
        command+=(-m distrain)
    elif [[ ${words[0]##*/} != distrain ]]; then
        return  # python with another module: complete files
    fi
    [[ $line == *[[:space:]] ]] && words+=("")
    words=("${words[@]:${#command[@]}}")
    (( ${#words[@]} )) || return
    while (( ${#words[@]} > 1 )) && [[ ${words[0]} == -* ]]; do
        case ${words[0]} in
            --config-dir|-cd|--config-path|-cp|--config-name|-cn)
                (( ${#words[@]} > 2 )) || return  # its value: a folder
                flags+=("${words[0]}" "${words[1]}"); words=("${words[@]:2}") ;;
            --config-*) flags+=("${words[0]}"); words=("${words[@]:1}") ;;
            *) words=("${words[@]:1}") ;;
        esac
    done
    word=${words[-1]}
    command+=("${flags[@]}" -sc query=bash)
    choices=$(COMP_LINE="distrain ${words[*]}" "${command[@]}" 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then
        prefix=${word%=*}=  # readline replaces only what comes after it
        COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    fi
}
complete -o nospace -o default -F _distrain_complete distrain python python3
"""

UNINSTALL = """complete -r distrain python python3
unset -f _distrain_complete
"""


def script(argv: Sequence[str]) -> str | None:
    """Return the bash script that the arguments ask for, None for other arguments."""
    if not any(flag in argv for flag in _FLAGS):
        return None
    if "install=bash" in argv:
        return INSTALL
    return UNINSTALL if "uninstall=bash" in argv else None
