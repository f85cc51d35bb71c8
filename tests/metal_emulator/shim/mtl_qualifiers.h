// Address spaces and function qualifiers mean nothing to a C++ compiler: static_check.py looks after them.
// Last, because no header may follow in which these words are names.
#pragma once

#define double mtl_error_double_does_not_exist_in_MSL
#define kernel
#define device
#define constant
#define thread
#define threadgroup
#define threadgroup_imageblock
#define fragment
#define vertex
