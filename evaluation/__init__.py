"""Figures of pictures and models: what `aim eval` measures, with all that it depends on.

    generated = open_pictures(Path("aim-sample"))
    real = open_pictures(Path("val"), replace(generated.fit, crop="centre"))
    compared = compare(generated, real, None, load_features(), Path("cache"), progress)
    print(figures(compared)[0]["fid"])

Sets of pictures, networks whose features are compared, and the figures themselves are modules of
their own; nothing here trains or exports.
"""
