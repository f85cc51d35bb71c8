"""Operations that have a Metal kernel. Each: naive reference, plain MLX form, launch, public function.

The letters used in every shape comment of the package:

    B  batch              T  tokens             D  hidden size          V  vocabulary
    Hq query heads        Hkv key/value heads   (attention)
    Hk key heads          Hv value heads        Dk, Dv their sizes      (gated delta rule)
    C  chunk              E  experts            K  convolution taps       Cn convolved channels
    S  keys held (the recurrent state, in formulas)   Dh attention head size   R rotary dimensions
"""
