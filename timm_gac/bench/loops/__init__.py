"""``timm-gac bench loops``: how fast a network trains in the loops that people have, beside a graphed step."""
