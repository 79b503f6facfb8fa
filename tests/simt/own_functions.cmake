# Copies the object file FROM to TO with other names for its inline functions and instances of templates. Otherwise the
# linker would keep one copy of each for all files, whatever the flags that a file was compiled with. Variables keep
# their names: there is one of each. W: weak functions; n: groups of constructors or destructors.
execute_process(COMMAND ${NM} ${FROM} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL " [Wn] [^\n]+" functions "${symbols}")
list(TRANSFORM functions REPLACE " . (.+)" "\\1 \\1.own\n")
string(CONCAT renamed ${functions})
file(WRITE ${TO}.names "${renamed}")
execute_process(COMMAND ${OBJCOPY} --redefine-syms=${TO}.names ${FROM} ${TO} COMMAND_ERROR_IS_FATAL ANY)
