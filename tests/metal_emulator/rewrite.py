"""The one change that a kernel's text needs before a C++ compiler takes it.

In: Metal text. Out: the same text, line for line, in which declarations of threadgroup *variables* are references to
memory of the runtime. Pointers, references and parameters in that address space stay: there the word means nothing
to the C++ compiler. Knows no types.
"""

import re

_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|[A-Za-z_]\w*|\s+|::|.', re.DOTALL)
_DECLARATOR = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<extents>(?:\[.*\])?)\s*$", re.DOTALL)
_FIRST_DECLARATOR = re.compile(r"\s*(?P<type>.*?)" + _DECLARATOR.pattern, re.DOTALL)
_OPENING, _CLOSING = "([{<", ")]}>"


def _is_blank(token: str) -> bool:
    return token.isspace() or token.startswith(("//", "/*"))


def _inside_parentheses(tokens: list[str]) -> bool:
    depth = 0
    for token in reversed(tokens):
        if token in (";", "{", "}"):
            return False
        depth += (token == "(") - (token == ")")
        if depth > 0:
            return True
    return False


def _split(tokens: list[str]) -> tuple[list[str], str]:
    """The declarators between top-level commas, and the text outside all brackets."""
    declarators, outside, open_brackets = [""], "", ""
    for token in tokens:
        in_angles = not open_brackets.strip("<")  # elsewhere < and > compare
        if token in _CLOSING and (token != ">" or (in_angles and open_brackets)):
            open_brackets = open_brackets[:-1]
        elif token in _OPENING and (token != "<" or in_angles):
            open_brackets += token
        elif not open_brackets:
            outside += token
        if token == "," and not open_brackets:
            declarators.append("")
        else:
            declarators[-1] += token
    return declarators, outside


def _references(tokens: list[str], first_id: int) -> list[str] | None:
    """C++ statements in place of `threadgroup` + tokens; None if it declares no variable."""
    declarators, outside = _split([token for token in tokens if not token.startswith(("//", "/*"))])
    # `threadgroup float* p`, `threadgroup float f(int)`, `threadgroup T a = b` are none, or none that MSL has.
    if any(sign in outside for sign in "*&=") or "(" in declarators[0].split("[")[0]:
        return None
    first = _FIRST_DECLARATOR.match(declarators[0])
    if first is None or not first["type"]:
        return None
    statements = []
    for number, declarator in enumerate(declarators, first_id):
        match = first if number == first_id else _DECLARATOR.match(declarator)
        if match is None:
            return None
        alias = f"mtl_threadgroup_type_{number}"
        memory = f'metal::mtl_threadgroup_variable<{alias}, {number}>("{match["name"]}")'
        statements.append(f"using {alias} = {first['type']} {match['extents']}; {alias}& {match['name']} = {memory}")
    return statements


def rewrite_threadgroup_variables(text: str) -> str:
    """`threadgroup T a[N], b;` in the place of a statement becomes references into the runtime's memory."""
    # The attribute of a kernel parameter is no declaration.
    tokens = _TOKEN.findall(re.sub(r"\[\[\s*threadgroup\s*\(", "[[mtl_threadgroup(", text))
    out: list[str] = []
    position, variables, previous = 0, 0, ";"
    while position < len(tokens):
        token = tokens[position]
        if token == "threadgroup" and previous in (";", "{", "}", ")", "else") and not _inside_parentheses(out):
            end = tokens.index(";", position) if ";" in tokens[position:] else len(tokens)
            statements = _references(tokens[position + 1 : end], variables)
            if statements is not None:
                replaced = "; ".join(statements)
                lost_lines = "".join(tokens[position:end]).count("\n") - replaced.count("\n")
                out.append(replaced + "\n" * lost_lines)
                variables += len(statements)
                position, previous = end, "variable"
                continue
        out.append(token)
        if not _is_blank(token):
            previous = token
        position += 1
    return "".join(out)
