/* The Python type of functions that run in the default float mode. */
#ifndef BN_GUARDED_FUNCTION_H
#define BN_GUARDED_FUNCTION_H

#include <Python.h>

/* A new reference to the type, whose only argument is a callable; NULL with an exception set. */
PyObject *bn_new_guarded_function_type(void);

#endif
